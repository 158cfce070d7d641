"""The course runs, and can fail: each mistake of test_mutations.py shows in the lesson where its README says so."""

import re
import tempfile
import warnings
from typing import Any

import pytest
from conftest import ROOT
from test_mutations import MUTATIONS, ops, restarting_positions

from qwen3core import Qwen3Model, Reranker, reference
from qwen3core.training import losses

COURSE = ROOT / "tests" / "course"
README = (COURSE / "README.md").read_text("utf-8")
LESSONS = {path.name[0]: path for path in sorted(COURSE.glob("[1-9]_*.py"))}
PLACES = {
    name: (lesson, message) for name, lesson, message in re.findall(r"^\| `(.+)` \| (\d) \| (.+) \|$", README, re.M)
}


def answers_swapped(patch):
    right = Qwen3Model.score_weight
    patch.setattr(Qwen3Model, "score_weight", lambda self, answers: right(self, answers[::-1]))


def positions_restarted(patch):
    right = Reranker.compute
    patch.setattr(Reranker, "compute", lambda self, batch, **rest: right(self, restarting_positions(batch), **rest))


PLANTS = {"yes and no swapped": answers_swapped, "positions from 0 behind a shared query": positions_restarted}
"""These two in the reranker alone, where test_mutations.py plants them in an embedder as well."""


def no_margin(patch):
    right = losses.info_nce
    patch.setattr(
        losses, "info_nce", lambda *args, temperature, margin: right(*args, temperature=temperature, margin=1)
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a lesson, by its number, as a program in an empty folder."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(COURSE))

    def execute(number: str) -> None:
        path = LESSONS[number]
        namespace: dict[str, Any] = {"__name__": "__main__"}
        with warnings.catch_warnings(action="ignore"):  # lesson 1 truncates texts on purpose
            exec(compile(path.read_text("utf-8"), str(path), "exec"), namespace)

    return execute


@pytest.mark.parametrize("number", LESSONS)
def test_lesson(run, number):
    run(number)


@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_is_a_notebook_of_small_cells(number):
    first, *cells = re.split(r"^# %%", LESSONS[number].read_text("utf-8"), flags=re.MULTILINE)
    markdown = [cell for cell in cells if cell.startswith(" [markdown]\n")]
    code = [cell for cell in cells if cell.startswith("\n")]
    assert not first
    assert len(cells) == len(markdown) + len(code)
    assert all(line.startswith("#") for cell in markdown for line in cell.strip().splitlines()[1:])
    assert markdown[0].startswith(f" [markdown]\n# # {number}. ")
    assert "# ## Exercises" in markdown[-1]
    assert code[-1].startswith("\n# Solutions\n")
    assert len(markdown) > 5
    assert max(cell.count("\n") for cell in code) <= 35


def test_the_table_has_every_mistake_and_its_lesson_names_it():
    assert sorted(PLACES) == sorted(MUTATIONS)
    for name, (number, _) in PLACES.items():
        assert f"`{name}`" in LESSONS[number].read_text("utf-8"), name


@pytest.mark.parametrize("name", PLACES)
def test_a_mistake_shows_where_the_table_says(run, monkeypatch, name):
    number, message = PLACES[name]
    _, plant = MUTATIONS[name]
    PLANTS.get(name, plant)(monkeypatch)
    with pytest.raises(AssertionError) as error:
        run(number)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (no_margin, "InfoNCE"),
        pytest.param(
            ops(rms_norm=lambda x, w, eps: reference.rms_norm(x, w, 10 * eps)),
            "the kernel's error against float64",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_lesson_5_can_fail(run, monkeypatch, plant, message):
    plant(monkeypatch)
    with pytest.raises(AssertionError) as error:
        run("5")
    assert str(error.value) == message
