"""What the documents say runs and holds: code blocks of every README, links, lines."""

import re
import runpy
from typing import Any

import pytest
from conftest import ROOT

FOLDERS = ("", "kernels/", "weights/", "bench/", "tests/experiments/", "tests/course/")
DOCUMENTS = [ROOT / f"{folder}README.md" for folder in FOLDERS]
README = DOCUMENTS[0].read_text("utf-8")


def python_blocks(document):
    """The document's Python, on small checkpoints in place of the official ones."""
    for block in re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
        code = block.replace("Qwen/Qwen3-Embedding-0.6B", "tiny-embedding")
        yield code.replace("Qwen/Qwen3-Reranker-0.6B", "tiny-reranker")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in python_blocks(document):
        if document.parent.name != "kernels":  # test_own_kernel
            exec(compile(code, str(document), "exec"), namespace)
    if document.parent == ROOT:
        assert namespace["vectors"].shape == (2, 256)
        assert namespace["scores"].shape == (2,)
        assert len(namespace["acts"]) == namespace["embedder"].model.config.num_hidden_layers + 1


KERNELS = ROOT / "kernels" / "README.md"
KERNEL = "\n".join(python_blocks(KERNELS))
"""Its steps in one file."""
MISTAKES = re.findall(r"^\| `(.*)` \| `(.*)` \| (\w+) \|$", KERNELS.read_text("utf-8"), re.MULTILINE)


def run_kernel(tmp_path, code):
    script = tmp_path / "my_norm.py"
    script.write_text(code, "utf-8")
    runpy.run_path(str(script))


def test_own_kernel(tmp_path, capsys):
    """The steps of kernels/README.md: a kernel that is right, in a model that is right, as short as it promises."""
    pytest.importorskip("transformers")
    assert KERNEL.count("\n") < 60
    run_kernel(tmp_path, KERNEL)
    out = capsys.readouterr().out
    assert out.startswith("right; ")
    assert out.count("| ok |") >= 8
    assert "FAIL" not in out


@pytest.mark.parametrize(("line", "becomes", "kind"), MISTAKES, ids=range(len(MISTAKES)))
def test_own_kernels_mistakes(line, becomes, kind, tmp_path, capsys):
    """Each mistake of its table is found, and is what the table says."""
    assert KERNEL.count(line) == 1
    with pytest.raises(AssertionError):
        run_kernel(tmp_path, KERNEL.replace(line, becomes))
    assert re.match(rf"WRONG; .*\n  {kind} ", capsys.readouterr().out)


def test_there_are_mistakes():
    assert len(MISTAKES) == 6


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / ".github" / "CONTRIBUTING.md"], ids=str)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_the_readme_is_short_and_counts_lines_right():
    """Each row of the reading order links files and says how many lines they have, within a tenth."""
    assert README.count("\n") <= 150
    rows = re.findall(r"^\| (\[[^|]+\.py\)) \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) > 10
    for links, lines in rows:
        files = re.findall(r"\]\(([^)]+)\)", links)
        counted = sum((ROOT / file).read_text("utf-8").count("\n") for file in files)
        assert abs(counted - int(lines)) <= 0.1 * counted, files
