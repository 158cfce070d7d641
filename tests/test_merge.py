"""Merging: the formula on known tensors, the files of the result, and what cannot be merged."""

import math
from dataclasses import replace

import pytest
import torch

from qwen3core import CheckpointError, Embedder, InputError
from qwen3core.commands import main
from qwen3core.weights.merge import merge, slerp
from qwen3core.weights.synthesize import LAYOUTS, synthesize
from qwen3core.weights.tensors import Tensors


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Float32 checkpoints of one shape, the first in two shards."""
    layout = LAYOUTS["Qwen3-Embedding-small"]
    layout = replace(layout, config=replace(layout.config, dtype="float32"))
    folder = tmp_path_factory.mktemp("merge")
    return [synthesize(folder / str(i), replace(layout, shards=2 if i == 0 else 1), seed=i) for i in range(3)]


def test_slerp_on_known_vectors():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        assert torch.allclose(slerp(a, b, t), expected, atol=1e-7)
    assert torch.allclose(slerp(a, 3 * b, 0.5), torch.tensor([1.0, 3.0]) * math.sqrt(0.5), atol=1e-7)
    assert torch.equal(slerp(a, 3 * a, 0.5), 2 * a)  # no angle
    assert torch.equal(slerp(a, -a, 0.5), 0 * a)  # no one way between opposites
    assert torch.equal(slerp(0 * a, a, 0.25), 0.25 * a)
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert slerp(x / x.norm(), y / y.norm(), 0.3).norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_three_checkpoints(three, linear, weights, tmp_path):
    merge(three, tmp_path / "out", weights=weights, linear=linear)
    parts, merged = [Tensors(path) for path in three], Tensors(tmp_path / "out")
    shares = weights or [1.0, 1.0, 1.0]
    assert set(merged) == set(parts[0])
    for name in merged:
        a, b, c = (part[name].double() for part in parts)
        if linear:
            expected = sum(w / sum(shares) * x for w, x in zip(shares, (a, b, c), strict=True))
        else:
            expected = by_angle(by_angle(a, b, shares[1] / sum(shares[:2])), c, shares[2] / sum(shares))
        assert (merged[name] - expected).norm() <= 1e-6 * expected.norm(), name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in three[0].iterdir())
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {p.stat().st_mode for p in three[0].iterdir()}
    assert Embedder.from_pretrained(tmp_path / "out").encode("a").shape == (64,)


def by_angle(a, b, t):
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def test_the_command(three, tmp_path, capsys):
    command = ["merge", *map(str, three), "-o", str(tmp_path / "out"), "--weights", "1", "2", "3"]
    assert main(command) == 0
    assert main(command) == 2
    assert "expected a new or an empty directory" in capsys.readouterr().err


def test_what_cannot_be_merged(three, embedding_dir, tmp_path):
    layout = LAYOUTS["Qwen3-Embedding-small"]
    wider = synthesize(tmp_path / "wider", replace(layout, config=replace(layout.config, intermediate_size=192)))
    for arguments, weights, message in [
        (three[:1], None, "merge: expected two or more checkpoints, found 1"),
        (three, [1, 2], "weights: expected 3 numbers above 0, found"),
        (three[:2], [1, 0], "weights: expected 2 numbers above 0, found"),
        ([three[0], wider], None, r"mlp\.down_proj\.weight.*expected shape \[64, 160\], found \[64, 192\]"),
        ([three[0], tmp_path], None, r"config\.json"),
    ]:
        with pytest.raises((InputError, CheckpointError), match=message):
            merge(arguments, tmp_path / "out", weights=weights)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="expected a directory other than the source's"):
        merge(three, three[0])
