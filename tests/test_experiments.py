"""The worked experiments: each runs and draws, is short, stands in the README, and fails where a mistake is planted."""

import ast
import re
import sys
import tempfile

import pytest
import torch
from conftest import ROOT

for library in ("ir_measures", "matplotlib", "sentence_transformers"):
    pytest.importorskip(library)

FOLDER = ROOT / "tests" / "experiments"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.py")) if path.stem != "lab"}
FIGURES = ("bars", "heatmap")
MISTAKES = {
    "retrieval_by_layer": ("text=None", "text=None, position=0"),
    "logit_lens": ("model.norm(acts.at(name, text=None))", "acts.at(name, text=None)"),
    "head_ablation": ("mean_ablate(usual)", "lambda z: z"),
    "activation_patching": ("patch(acts, position)", "patch(acts, position - 1)"),
    "attribution": ("embeddings.clone()", "x.clone()"),
    "attention_pattern": ("pattern[1, -1", "pattern[0, -1"),
    "pooling": ("include_prompt=False", "include_prompt=True"),
    "bidirectional": ("causal=False", "causal=True"),
    "probe": ("per_text(name)", 'per_text("embed")'),
    "steering": ("text=None", "text=None, position=0"),
    "pruning": ("layers[i + 1 :]", "layers[i:]"),
    "own_loss": ("    optimizer.step()\n", ""),
}
"""What is planted into each, by an edit of its source: one of its own steps done wrong."""
LONG = ("head_ablation", "pooling", "probe", "pruning", "own_loss")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a source as a program in an empty folder, with these arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(FOLDER))

    def execute(name: str, source: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        torch.manual_seed(0)
        exec(compile(source, str(FOLDER / f"{name}.py"), "exec"), {"__name__": "__main__"})

    return execute


@pytest.mark.parametrize("name", SOURCES)
def test_experiment(run, tmp_path, capsys, name):
    run(name, SOURCES[name], "--figure", "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) > 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SOURCES])
def test_a_planted_mistake_fails(run, tmp_path, name):
    right, wrong = MISTAKES[name]
    assert SOURCES[name].count(right) == 1
    with pytest.raises(AssertionError):
        run(name, SOURCES[name].replace(right, wrong))
    assert not list(tmp_path.glob("*.png"))


def body(source: str) -> list[str]:
    """Lines that are not blank, without docstring, imports and calls that draw."""
    lines = source.splitlines()
    docstring, *statements = ast.parse(source).body
    for node in (docstring, *statements):
        call = node.value if isinstance(node, ast.Expr) else None
        draws = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in FIGURES
        if node is docstring or draws or isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    return [line for line in lines if line.strip()]


def test_fifteen_lines_and_an_assertion():
    assert body('"""D.\n\nE."""\n\nimport a\n\nx = 1\nbars(\n    x\n)\nassert (\n    x\n)\n') == [
        "x = 1",
        "assert (",
        "    x",
        ")",
    ]
    for name, source in SOURCES.items():
        lines = body(source)
        assert len(lines) <= 15, name
        assert any(line.startswith("assert ") for line in lines), name
        assert len(ast.get_docstring(ast.parse(source)) or "") > 100, name


def test_the_table_has_each_experiment():
    assert re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (FOLDER / "README.md").read_text("utf-8"), re.M) == [*MISTAKES]
    assert sorted(MISTAKES) == sorted(SOURCES)
    assert len(SOURCES) == 12
