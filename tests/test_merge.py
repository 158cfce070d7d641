"""Merging: the formula on known tensors, the files of the result, and what cannot be merged."""

import json
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

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
    (empty := tmp_path / "empty").mkdir()
    for arguments, weights, message in [
        (three[:1], None, "merge: expected two or more checkpoints, found 1"),
        (three, [1, 2], "weights: expected 3 numbers, found"),
        (three[:2], [1, 0], "weights: expected a finite number above 0, found 0"),
        (three[:2], [1, math.nan], "weights: expected a finite number above 0, found nan"),
        (three[:2], [math.inf, 1], "weights: expected a finite number above 0, found inf"),
        (three[:2], [1e308, 1e308], "weights: their sum: expected a finite number"),
        ([three[0], wider], None, r"mlp\.down_proj\.weight.*expected shape \[64, 160\], found \[64, 192\]"),
        ([three[0], empty], None, r"config\.json"),
    ]:
        with pytest.raises((InputError, CheckpointError), match=message):
            merge(arguments, tmp_path / "out", weights=weights)
        assert not (tmp_path / "out").exists()
    for output in (path for source in three for path in (source, source / "inside")):
        with pytest.raises(InputError, match="expected a directory other than the source's"):
            merge(three, output)


@pytest.fixture
def other(three, tmp_path):
    """A copy of the second checkpoint, to be changed."""
    return shutil.copytree(three[1], tmp_path / "other")


def change(path, function):
    """Rewrite a JSON file; the function changes what is parsed in place."""
    data = json.loads(path.read_text("utf-8"))
    function(data)
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def swap(data):
    vocab = data["model"]["vocab"]
    a, b = list(vocab)[280:282]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def rename(data):
    data["added_tokens"][-1]["content"] = "<another>"


def test_vocabularies_that_number_words_differently(three, other, tmp_path):
    vocab = json.loads((other / "tokenizer.json").read_text("utf-8"))
    first = list(vocab["model"]["vocab"])[280]
    change(other / "tokenizer.json", swap)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as error:
        merge([three[0], other], tmp_path / "out")
    assert f"{first!r}: expected token 280 as in {three[0]}, found 281" in str(error.value)
    assert main(["merge", str(three[0]), str(other), "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    shutil.copyfile(three[1] / "tokenizer.json", other / "tokenizer.json")
    change(other / "tokenizer.json", rename)
    last = vocab["added_tokens"][-1]
    with pytest.raises(CheckpointError, match="found '<another>' there") as error:
        merge([three[0], other], tmp_path / "out")
    assert f"{last['content']!r}: expected token {last['id']}" in str(error.value)


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("", lambda data: data["added_tokens"].pop()),  # a word that only one has
        ("normalizer", lambda data: data.update(normalizer={"type": "NFKC"})),
        ("pre_tokenizer", lambda data: data.update(pre_tokenizer=data["decoder"])),
        ("merges", lambda data: data["model"]["merges"].pop()),
    ],
)
def test_other_rules_of_splitting_are_said(three, other, tmp_path, what, function):
    change(other / "tokenizer.json", function)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge([three[0], other], tmp_path / "out")
    assert [str(w.message) for w in said] == [
        f"{other}: its {what} differ from those of {three[0]}, which the merged checkpoint has"
    ][: bool(what)]


def test_other_arithmetic(three, other, tmp_path):
    first = shutil.copytree(three[0], tmp_path / "first")
    for path in (first, other):
        (path / "modules.json").unlink()
    for name, value in [("rope_theta", 1e4), ("rms_norm_eps", 1e-5), ("tie_word_embeddings", False)]:
        shutil.copyfile(first / "config.json", other / "config.json")
        change(other / "config.json", lambda data, changed={name: value}: data.update(changed))
        with pytest.raises(CheckpointError, match=rf"config\.json: {name}: expected .* as in .*, found {value}"):
            merge([first, other], tmp_path / "out")


@pytest.mark.parametrize("order", [1, -1])
def test_an_embedding_checkpoint_and_a_reranker(three, other, tmp_path, order):
    synthesize(tmp_path / "reranker", "Qwen3-Reranker-small")
    with pytest.raises(CheckpointError, match=r"job: expected '.*' as in .*, found '.*'"):
        merge([three[0], tmp_path / "reranker"][::order], tmp_path / "out")
    (other / "modules.json").unlink()
    with pytest.warns(UserWarning, match=r"expected a checkpoint for .* as .*, found .*none|for no job as"):
        merge([three[0], other][::order], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([other, other], tmp_path / "two_of_a_kind")


def add_dense(directory, value):
    """A Dense of sentence-transformers in a folder of its own, every weight the value."""
    change(
        directory / "modules.json",
        lambda data: data.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"}),
    )
    (directory / "3_Dense").mkdir()
    (directory / "3_Dense" / "config.json").write_text(
        '{"in_features": 64, "out_features": 2, "bias": false, "activation_function": "torch.nn.Identity"}', "utf-8"
    )
    weights = {"linear.weight": torch.full((2, 64), value)}
    save_file(weights, directory / "3_Dense" / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_modules_in_folders_are_merged(three, tmp_path):
    first, second = (
        add_dense(shutil.copytree(path, tmp_path / path.name), i + 1.0) for i, path in enumerate(three[:2])
    )
    merge([first, second], tmp_path / "out", linear=True)
    assert torch.equal(Tensors(tmp_path / "out")["3_Dense.linear.weight"], torch.full((2, 64), 1.5))
    assert (tmp_path / "out" / "3_Dense" / "config.json").exists()
    for arguments in ([first, three[1]], [three[0], second]):
        with pytest.raises(CheckpointError, match=r"(missing|unexpected) tensor '(3_Dense\.)?linear\.weight'"):
            merge(arguments, tmp_path / "not")
    change(second / "3_Dense" / "config.json", lambda data: data.update(activation_function="torch.nn.Tanh"))
    with pytest.raises(CheckpointError, match=r"modules: expected .*Identity.* as in .*, found .*Tanh"):
        merge([first, second], tmp_path / "not")


def test_other_modules_and_other_settings(three, other, tmp_path):
    shutil.copyfile(three[0] / "modules.json", other / "modules.json")
    settings = other / "config_sentence_transformers.json"
    change(settings, lambda data: data.update(__version__="another"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([three[0], other], tmp_path / "same")
    change(settings, lambda data: data.update(prompts={"query": "another: "}))
    with pytest.warns(UserWarning, match="its prompts differ from those of"):
        merge([three[0], other], tmp_path / "warned")
    change(other / "1_Pooling" / "config.json", lambda data: data.update(include_prompt=False))
    with pytest.raises(CheckpointError, match=r"include_prompt: expected True as in .*, found False"):
        merge([three[0], other], tmp_path / "out")
    shutil.copyfile(three[0] / "1_Pooling" / "config.json", other / "1_Pooling" / "config.json")
    change(other / "modules.json", lambda data: data.pop())
    with pytest.raises(CheckpointError, match=r"normalize: expected True as in .*, found False"):
        merge([three[0], other], tmp_path / "out")


@pytest.mark.parametrize("stored", [(True, False), (False, True), (True, True)])
def test_an_lm_head_stored_beside_tied_embeddings(three, tmp_path, stored):
    """It is merged as the embeddings are where it equals them, and is no reranker's otherwise."""
    paths = [shutil.copytree(path, tmp_path / path.name) for path in three[1:]]
    for path, has in zip(paths, stored, strict=True):
        (path / "modules.json").unlink()
        if has:
            weights = {name: Tensors(path)[name] for name in Tensors(path)}
            weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    merge(paths, tmp_path / "out")
    out = Tensors(tmp_path / "out")
    assert ("lm_head.weight" in out) == stored[0]
    if stored[0]:
        assert torch.equal(out["lm_head.weight"], out["embed_tokens.weight"])
    path = paths[stored.index(True)]
    weights = {name: Tensors(path)[name] for name in Tensors(path)}
    save_file(weights | {"lm_head.weight": 2 * weights["lm_head.weight"]}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings: expected"):
        merge(paths, tmp_path / "not")


def test_a_merger_that_is_not_finite(three, tmp_path):
    """As one of the sources is, or since the first one's dtype cannot hold a number of another."""
    name = "layers.1.mlp.up_proj.weight"
    tensors = Tensors(three[1])

    def copy(folder, value, dtype=torch.float32):
        weights = {key: tensors[key].to(dtype) for key in tensors}
        weights[name] = weights[name].index_fill(0, torch.tensor(0), value)
        save_file(weights, shutil.copytree(three[1], folder) / "model.safetensors", metadata={"format": "pt"})
        return folder

    half, large = copy(tmp_path / "half", 0.0, torch.float16), copy(tmp_path / "large", 1e6)
    bad = [copy(tmp_path / str(value), value) for value in (math.inf, math.nan)]
    for first, second, dtype in [
        (three[0], bad[0], "float32"),
        (bad[1], three[0], "float32"),
        (half, large, "float16"),
    ]:
        with pytest.raises(InputError, match=f"{name}: expected weights that are finite in torch.{dtype}, found some"):
            merge([first, second], tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
