"""The package as installed: imports, layout, the two commands of the README."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def python(code, cwd=ROOT):
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_imports_neither_transformers_nor_triton(tmp_path):
    imports = "import qwen3core.commands, qwen3core.parity"
    code = f"import sys, torch; old = set(sys.modules); {imports}; print(*set(sys.modules) - old)"
    for cwd in (ROOT, tmp_path):
        new = {name.split(".")[0] for name in python(code, cwd).split()}
        assert "qwen3core" in new
        heavy = {"transformers", "triton", "sentence_transformers", "fastapi", "uvicorn", "pyarrow", "ray", "mteb"}
        assert not new & (heavy | {"kernels", "weights"})


def test_without_triton_its_ops_say_so():
    code = "import sys; sys.modules['triton'] = None\nimport qwen3core\n"
    code += "try: qwen3core.Ops.triton()\nexcept qwen3core.InputError as error: print(error)"
    assert "ops 'triton': triton is not installed: pip install triton" in python(code)


def test_transformers_imports_from_the_root_beside_the_kernels_package():
    """Our kernels/ has no __init__.py, so that the package of that name, which transformers imports, wins."""
    for package in ("kernels", "transformers"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    importlib.metadata.version("kernels")  # the package of that name, not a folder
    out = python("import transformers.models.qwen3.modeling_qwen3, kernels; print(kernels.__file__)")
    assert ROOT / "kernels" not in Path(out.strip()).parents
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "weights" / "__init__.py").exists()


def test_top_level_is_fixed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    allowed = {"pyproject.toml", "qwen3core", "kernels", "weights", "tests", "bench", "README.md", "LICENSE"}
    top = {file.split("/")[0] for file in files}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert commands[0].rstrip().endswith("qwen3core demo")
    assert "pytest" in commands[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
