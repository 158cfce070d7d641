"""The README's Python runs as it stands, on small checkpoints in place of the official ones."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_python_blocks_run_in_order(capsys):
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "triton" not in block]
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        code = block.replace("Qwen/Qwen3-Embedding-0.6B", "tiny-embedding")
        code = code.replace("Qwen/Qwen3-Reranker-0.6B", "tiny-reranker")
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["vectors"].shape == (2, 256)
    assert namespace["scores"].shape == (2,)
    out = capsys.readouterr().out
    assert out.count("tensor(") == 2
    assert "torch.Size([" in out


def test_own_kernel(embedding_dir, tmp_path):
    """The kernel's block is a file that runs as the README says, and is as short as it promises."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "triton" in block]
    assert block.count("\n") < 40
    script = tmp_path / "my_swiglu.py"
    script.write_text(block.replace("Qwen/Qwen3-Embedding-0.6B", str(embedding_dir)), "utf-8")
    environment = os.environ | {"PYTHONPATH": f"bench{os.pathsep}."}
    run = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| ok |") == 8
    assert "'my_swiglu': {'p20'" in run.stdout


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", readme, flags=re.DOTALL))
    assert len(links) > 10
    assert all((ROOT / link).exists() for link in links)
