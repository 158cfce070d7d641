"""The one writer: whole or not at all, readable as the umask says."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from limits import full_disk, umask
from safetensors.torch import save_file

from qwen3core.commands import main
from qwen3core.commands.files import FORMATS
from qwen3core.weights.synthesize import synthesize
from qwen3core.writing import writing, writing_into


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(embedding_dir, tmp_path, mask, expected):
    with umask(mask):
        for ending in FORMATS:
            assert main(["embed", str(embedding_dir), "a tree", "-o", str(tmp_path / f"vectors{ending}")]) == 0
        synthesize(tmp_path / "model")
    assert modes(tmp_path) == {expected}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_full_disk_is_said_and_keeps_the_old_file(embedding_dir, tmp_path, capsys, ending):
    out = tmp_path / f"vectors{ending}"
    out.write_bytes(b"old")
    with full_disk(100):
        status = main(["embed", str(embedding_dir), "a tree", "a fish", "-o", str(out)])
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith(f"qwen3core: {tmp_path}: expected to write files there, found ")
    assert said.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("size", [100, 5_000, 50_000])
def test_half_a_checkpoint_is_none(tmp_path, size):
    with full_disk(size), pytest.raises(OSError, match="too large"):
        synthesize(tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "x.txt")
    for content in ("one", "two"):
        with writing(tmp_path / "link") as part:
            part.write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "x.txt").read_text() == content


def test_what_a_killed_process_left_is_removed(tmp_path):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom qwen3core.writing import writing_into\n"
        "with writing_into(Path(sys.argv[1])) as part:\n"
        "    (part / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.rglob("*")] == [".part", "half"]
    with writing_into(tmp_path) as part:
        save_file({"x": torch.ones(3)}, part / "whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["whole"]
