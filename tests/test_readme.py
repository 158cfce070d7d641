"""The README's Python runs as it stands, on small checkpoints in place of the official ones."""

import re

from conftest import ROOT


def test_python_blocks_run_in_order(embedding_dir, reranker_dir, capsys):
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        code = block.replace("Qwen/Qwen3-Embedding-0.6B", str(embedding_dir))
        code = code.replace("Qwen/Qwen3-Reranker-0.6B", str(reranker_dir))
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["vectors"].shape == (2, 64)
    assert namespace["scores"].shape == (2,)
    out = capsys.readouterr().out
    assert out.count("tensor(") == 2
    assert "torch.Size([" in out


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(links) > 10
    assert all((ROOT / link).exists() for link in links)
