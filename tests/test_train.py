"""Training, on checkpoints of random weights: the losses by hand, and what the loop promises."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import layouts
import pytest
import tolerances
import torch
from limits import full_disk, umask
from safetensors.torch import save_file
from torch.nn import functional as F

from qwen3core import Embedder, InputError, Reranker, capture, reference
from qwen3core.commands import main
from qwen3core.parity import parity
from qwen3core.training import Example, Options, embedding_task, losses, read_examples, reranking_task, train
from qwen3core.training.cached_gradients import CachedGradients
from qwen3core.training.losses import Groups
from qwen3core.weights.tensors import Tensors

EXAMPLES = [
    Example(f"what is {a}", f"{a} is a kind of {b}", (f"{c} is a kind of {b}",))
    for a, b, c in [
        ("an oak", "tree", "a pine"),
        ("a trout", "fish", "a pike"),
        ("a rose", "flower", "a tulip"),
        ("bread", "food", "butter"),
        ("a violin", "instrument", "a flute"),
        ("gold", "metal", "iron"),
        ("a sparrow", "bird", "an owl"),
        ("chess", "game", "poker"),
    ]
]
OPTIONS = Options(epochs=6, batch_size=4, batch_tokens=100, learning_rate=1e-3, save_every=5)


@pytest.fixture
def small(embedding_dir, reranker_dir):
    return {Embedder: embedding_dir, Reranker: reranker_dir}


@pytest.fixture
def data(tmp_path):
    """The examples as a file."""
    rows = [{"query": e.query, "response": e.positive, "rejected_response": list(e.negatives)} for e in EXAMPLES]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def opened(kind, path):
    found = kind.from_pretrained(path, dtype="float32")
    found.model.requires_grad_()
    return found


def task_of(opened, examples=EXAMPLES, **options):
    make = embedding_task if isinstance(opened, Embedder) else reranking_task
    return make(examples, opened.tokenizer, **options)


def recorded(folder):
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


SCORE_MODULE = layouts.dense(layouts.WIDTH, 1, "Identity", module_output_name="scores")
AROUND: dict[str, tuple[str, Any]] = {
    "Dense": ("embedding", lambda d: layouts.modules(d, layouts.pooling("mean"), layouts.dense(layouts.WIDTH, 24))),
    "score head": ("reranker", layouts.classifier),
    "Dense score": ("reranker", lambda d: layouts.pooled_score(d, layouts.pooling(), SCORE_MODULE)),
    "one token": ("reranker", lambda d: layouts.logit_score(d, "1", None)),
    "bidirectional": ("embedding", lambda d: layouts.edit(d, "config.json", is_causal=False)),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_surrounds_the_decoder_is_trained(name, bases, data, tmp_path):
    job, change = AROUND[name]
    source, out = layouts.copy(bases[job], tmp_path / "source"), tmp_path / "out"
    change(source)
    before = layouts.OURS[job](source)
    flags = ["--epochs", "3", "--batch-size", "3", "--learning-rate", "0.01"]
    assert main(["train", str(source), str(data), "-o", str(out), *flags]) == 0
    changed = {key for key in Tensors(source) if not torch.equal(Tensors(source)[key], Tensors(out)[key])}
    assert {key for key in Tensors(source) if not key.startswith(("layers.", "embed_", "norm."))} <= changed
    after = layouts.OURS[job](out)
    assert layouts.difference(after, layouts.TRUTH[job](out)) <= tolerances.EMBEDDING_FP32
    assert layouts.difference(after, before) > 1e-3


def test_info_nce_by_hand():
    vectors = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    groups = Groups(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5, 6]), torch.tensor([0, 0, 1]))
    s = lambda i, j: float(vectors[i] @ vectors[j])  # noqa: E731
    rows = [(0, 2, [s(0, 3), s(0, 1), s(2, 3), s(0, 4), s(0, 5)]), (1, 3, [s(1, 2), s(1, 0), s(3, 2), s(1, 6)])]
    for margin in (0.1, -0.5, 3.0):
        expected = 0.0
        for query, positive, others in rows:
            own = s(query, positive)
            candidates = [own, *(x for x in others if x <= own + margin)]
            expected += -math.log(math.exp(own / 0.2) / sum(math.exp(x / 0.2) for x in candidates)) / 2
        found = losses.info_nce(vectors, groups, temperature=0.2, margin=margin)
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_batch_holds_no_text_against_itself():
    """Equal positives, and several positives of one query, are no negatives of each other."""
    vectors = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    same_positive = Groups(torch.tensor([0, 1]), torch.tensor([2, 2]), *[torch.empty(0, dtype=torch.int64)] * 2)
    same_query = Groups(torch.tensor([0, 0]), torch.tensor([2, 3]), *[torch.empty(0, dtype=torch.int64)] * 2)
    assert losses.info_nce(vectors, same_query, temperature=1.0, margin=9.0).item() == 0
    own, query = (vectors[0] @ vectors[2]).exp(), (vectors[0] @ vectors[1]).exp()
    first = -(own / (own + query)).log()
    both = losses.info_nce(vectors, same_positive, temperature=1.0, margin=9.0)
    own = (vectors[1] @ vectors[2]).exp()
    assert both.item() == pytest.approx(float(first - (own / (own + query)).log()) / 2, rel=1e-6)


def test_the_rerankers_losses_by_hand():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    groups = Groups(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([2, 3, 4]), torch.tensor([0, 0, 1]))
    p = torch.sigmoid(logits)
    right = torch.stack([p[0], p[1], 1 - p[2], 1 - p[3], 1 - p[4]])
    assert losses.pointwise(logits, groups).item() == pytest.approx(float(-right.log().mean()), rel=1e-12)
    e = logits.exp()
    shares = torch.stack([e[0] / (e[0] + e[2] + e[3]), e[1] / (e[1] + e[4])])
    assert losses.listwise(logits, groups).item() == pytest.approx(float(-shares.log().mean()), rel=1e-12)


def keep(seen, name, parameter):
    seen[name] = parameter.grad.clone()


@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_small_passes_give_the_whole_batchs_gradient(kind, small, tmp_path):
    """Cached gradients, shared prefixes and activation checkpointing change memory, not the gradient."""
    gradients = []
    for batch_tokens, recompute in ((10**6, False), (60, False), (60, True)):
        model = opened(kind, small[kind])
        seen: dict[str, torch.Tensor] = {}
        for name, parameter in model.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(keep, seen, name))
        options = Options(batch_size=8, batch_tokens=batch_tokens, recompute=recompute)
        train(model.model, task_of(model), options, tmp_path)
        gradients.append(seen)
    whole, *others = gradients
    for other in others:
        for name, gradient in whole.items():
            assert (other[name] - gradient).norm() <= tolerances.GRADIENT_FP32 * gradient.norm(), name


def test_prefixes_are_shared_only_where_the_model_allows_it(small):
    """While a point is hooked, every text goes through the model whole."""
    embedder = opened(Embedder, small[Embedder])
    task = task_of(embedder)
    gradients = CachedGradients(embedder.model, task, 10**6)
    examples = list(range(len(EXAMPLES)))
    sequences, prefixes, _ = task.batch(examples)
    with capture(embedder.model, "embed") as acts:
        whole = gradients.compute(examples)
    assert len(acts["embed"]) == sum(map(len, sequences)) == whole[1]
    assert sum(len(batch.input_ids) for batch in gradients.pack(sequences, prefixes)) < whole[1]
    assert gradients.compute(examples) == pytest.approx(whole, rel=tolerances.LOSS_FP32)


@pytest.mark.parametrize("kind", [Embedder, pytest.param(Reranker, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(kind, small, tmp_path):
    whole = opened(kind, small[kind])
    train(whole.model, task_of(whole), OPTIONS, tmp_path / "whole")

    class Killed(Exception):
        pass

    part = opened(kind, small[kind])
    task = task_of(part)
    calls = iter(range(8))

    def batch(indices):
        if next(calls, None) is None:
            raise Killed
        return task.batch(indices)

    with pytest.raises(Killed):
        train(part.model, dataclasses.replace(task, batch=batch), OPTIONS, tmp_path / "part")
    again = opened(kind, small[kind])
    train(again.model, task, OPTIONS, tmp_path / "part")
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "part")
    assert not (tmp_path / "part" / "state.pt").exists()


def interrupted(folder, model, task, options=OPTIONS, *, steps=6):
    """Train for some steps, as far as a kill lets it."""
    left = iter(range(steps))

    def batch(indices):
        next(left)  # one step more raises StopIteration
        return task.batch(indices)

    with pytest.raises(StopIteration):
        train(model, dataclasses.replace(task, batch=batch), options, folder)


@pytest.fixture(scope="module")
def stopped(embedding_dir, tmp_path_factory):
    """The folder of a training of embeddings, stopped after the first of two states."""
    folder = tmp_path_factory.mktemp("stopped")
    embedder = opened(Embedder, embedding_dir)
    interrupted(folder, embedder.model, task_of(embedder))
    return folder


REVERSED = [dataclasses.replace(e, query=e.query[::-1]) for e in EXAMPLES]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"examples": REVERSED}, "examples '"),
        ({"examples": [*EXAMPLES[1:], EXAMPLES[0]]}, "examples '"),
        ({"instruction": "Find the kind"}, "instruction 'Given"),
        ({"max_length": 100}, "max_length 512, here 100"),
        ({"dims": [32]}, "dims None, here [32]"),
        ({"temperature": 0.05}, "temperature 0.02, here 0.05"),
        ({"margin": 0.2}, "margin 0.1, here 0.2"),
        ({"options": {"seed": 1}}, "seed 0, here 1"),
        ({"options": {"batch_tokens": 99}}, "batch_tokens 100, here 99"),
        ({"options": {"epochs": 7}}, "epochs 6, here 7"),
        ({"ops": "reference"}, "linear=qwen3core.products"),
        ({"weight": 1}, "model '"),
        ({"frozen": 1}, "trained '"),
        ({"task": reranking_task}, "task 'embedding', here 'reranking'"),
        ({"split_special_tokens": True}, "tokenizer '"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_training_is_refused(change, named, stopped, small):
    """By the name of what differs, with both values."""
    change = dict(change)
    from_pretrained = {name: change.pop(name) for name in ("ops", "split_special_tokens") if name in change}
    embedder = Embedder.from_pretrained(small[Embedder], dtype="float32", **from_pretrained)
    model = embedder.model.requires_grad_()
    options = dataclasses.replace(OPTIONS, **change.pop("options", {}))
    with torch.no_grad():
        model.norm.weight[0] += change.pop("weight", 0)
    model.norm.requires_grad_(not change.pop("frozen", 0))
    task = change.pop("task", embedding_task)(change.pop("examples", EXAMPLES), embedder.tokenizer, **change)
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(InputError, match="expected the state of this training, found one of") as raised:
        train(model, task, options, stopped)
    assert named in str(raised.value)
    assert "use its options, or remove it" in str(raised.value)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def test_losses_and_operations_are_known_by_name_and_arguments(small, tmp_path):
    """Not by the address of a process."""
    found = []
    for margin in (1.0, 1.0, 2.0):
        reranker = opened(Reranker, small[Reranker])
        reranker.model.ops = dataclasses.replace(reranker.model.ops, rms_norm=partial(reference.rms_norm))
        loss = partial(lambda logits, groups, margin: losses.listwise(margin * logits, groups), margin=margin)
        found.append(task_of(reranker, loss=loss))
    often = dataclasses.replace(OPTIONS, save_every=1)
    interrupted(tmp_path, reranker.model, found[0], often, steps=1)
    model = opened(Reranker, small[Reranker]).model
    with pytest.raises(
        InputError, match=r"one of loss .*margin=1\.0\)', here .*margin=2\.0\)'.*; ops .*partial.*, here"
    ):
        train(model, found[2], OPTIONS, tmp_path)
    model.ops = dataclasses.replace(model.ops, rms_norm=partial(reference.rms_norm))
    interrupted(tmp_path, model, found[1], steps=0)  # resumed, as far as its first batch


@pytest.mark.parametrize("broken", ["half a state", "no state", "half a row", "no rows"])
def test_what_a_kill_or_a_lost_disk_leaves(broken, stopped, small, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    state, log = folder / "state.pt", folder / "loss.jsonl"
    content = state.read_bytes()
    rows = log.read_bytes()
    (folder / ".state.pt.part").mkdir()  # of a process killed while it wrote
    (folder / ".state.pt.part" / "state.pt").write_bytes(content[:100])
    embedder = opened(Embedder, small[Embedder])
    if "state" in broken:
        state.write_bytes(content[: len(content) // 2] if "half" in broken else b"")
        with pytest.raises(
            InputError, match=r"state\.pt: expected the state of a training, found .* remove it to begin"
        ):
            train(embedder.model, task_of(embedder), OPTIONS, folder)
        return
    log.write_bytes(rows[:-9])
    if "no rows" in broken:
        log.unlink()
    train(embedder.model, task_of(embedder), dataclasses.replace(OPTIONS, save_every=3), folder)  # decides no number
    expected = list(range(12)) if "half" in broken else list(range(5, 12))
    assert [row["step"] for row in recorded(folder)] == expected
    assert {path.name for path in folder.iterdir()} - {"loss.png"} == {"loss.jsonl"}


def test_the_state_stays_until_the_result_is_written(small, tmp_path):
    def fail():
        raise OSError("disk full")

    whole = opened(Embedder, small[Embedder])
    with pytest.raises(OSError, match="disk full"):
        train(whole.model, task_of(whole), OPTIONS, tmp_path, write=fail)
    rows = recorded(tmp_path)
    assert len(rows) == 12

    again = opened(Embedder, small[Embedder])
    written = []

    def write():
        assert (tmp_path / "state.pt").exists()
        written.append(again.model.state_dict())

    task = dataclasses.replace(task_of(again), batch=lambda indices: pytest.fail("trained again"))
    train(again.model, task, OPTIONS, tmp_path, write=write)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, written[0][name]), name
    assert recorded(tmp_path) == rows
    assert not (tmp_path / "state.pt").exists()


def test_a_state_that_the_disk_does_not_take(small, stopped, tmp_path):
    """Said in a sentence; the state before stays."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    embedder = opened(Embedder, small[Embedder])
    said = r"run: expected to write files there, found .*File too large"
    with full_disk(1_000_000), pytest.raises(OSError, match=said):
        train(embedder.model, task_of(embedder), OPTIONS, folder)
    assert (folder / "state.pt").read_bytes() == (stopped / "state.pt").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"state.pt", "loss.jsonl"}


def test_one_training_at_a_time_in_a_folder(small, tmp_path):
    embedder = opened(Embedder, small[Embedder])
    task = task_of(embedder)

    def batch(indices):
        with pytest.raises(InputError, match="expected no other run there, found one that is running"):
            train(embedder.model, task, OPTIONS, tmp_path)
        raise StopIteration

    with pytest.raises(StopIteration):
        train(embedder.model, dataclasses.replace(task, batch=batch), OPTIONS, tmp_path)
    train(embedder.model, task, dataclasses.replace(OPTIONS, epochs=0.5), tmp_path)


def test_a_gradient_that_is_not_finite_changes_no_weight(small, tmp_path):
    """The root of 0 is finite, its slope is not: in the last step, no loss after it would tell."""
    embedder = opened(Embedder, small[Embedder])
    task = dataclasses.replace(task_of(embedder), loss=lambda outputs, groups: (0 * outputs).sum().sqrt())
    before = {name: x.clone() for name, x in embedder.model.state_dict().items()}
    with pytest.raises(InputError, match=r"learning_rate 0\.001: expected a finite gradient, found nan at step=0"):
        train(embedder.model, task, dataclasses.replace(OPTIONS, epochs=0.5), tmp_path)
    for name, x in embedder.model.state_dict().items():
        assert torch.equal(x, before[name]), name


ALONE = [dataclasses.replace(e, negatives=()) for e in EXAMPLES]
ONE_QUERY = [dataclasses.replace(e, query="which?") for e in ALONE]


@pytest.mark.parametrize(
    ("kind", "examples", "options", "message"),
    [
        (Embedder, ALONE, {"batch_size": 1}, "found no negatives, batch_size 1 and different queries 8"),
        (Embedder, ONE_QUERY, {"batch_size": 4}, "found no negatives, batch_size 4 and different queries 1"),
        (Reranker, ALONE, {"loss": losses.listwise}, r"expected negatives \(rejected_response\), found none"),
        (Reranker, ALONE, {"loss": losses.pointwise}, r"expected negatives \(rejected_response\), found none"),
        (Embedder, EXAMPLES, {"dims": [64, 65]}, "dims: expected an integer from 1 to 64, found 65"),
        (Embedder, EXAMPLES, {"temperature": 0}, "temperature: expected a finite number above 0, found 0"),
        (Embedder, EXAMPLES, {"margin": math.nan}, "margin: expected a finite number of at least 0, found nan"),
        (Embedder, EXAMPLES, {"max_length": 9}, r"max_length: expected an integer of at least \d\d, found 9"),
        (Reranker, EXAMPLES, {"max_length": 20}, r"max_length: expected an integer of at least \d\d, found 20"),
        (Embedder, EXAMPLES, {"batch_size": 9}, r"epochs 1\.0 x 8 examples / batch_size 9: expected one step or more"),
    ],
)
def test_what_cannot_learn_is_refused_before_it_begins(kind, examples, options, message, small, tmp_path):
    model = opened(kind, small[kind])
    size = {"batch_size": options.pop("batch_size", 4)}
    with pytest.raises(InputError, match=message):
        train(model.model, task_of(model, examples, **options), Options(**size), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batches_of_one_with_negatives_and_pairs_in_a_batch_learn(small, tmp_path):
    embedder = opened(Embedder, small[Embedder])
    for number, (examples, size) in enumerate(((EXAMPLES, 1), (ALONE, 2))):
        train(embedder.model, task_of(embedder, examples), Options(batch_size=size), tmp_path / str(number))
        assert max(row["grad_norm"] for row in recorded(tmp_path / str(number))) > 0


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        pytest.param("embedding", [], id="embedding"),
        pytest.param("reranker", ["--lora", "4"], id="reranker-lora", marks=pytest.mark.slow),
        pytest.param("embedding", ["--lora", "4"], id="embedding-lora", marks=pytest.mark.slow),
        pytest.param("reranker", [], id="reranker", marks=pytest.mark.slow),
        pytest.param("embedding", ["--bfloat16", "--recompute"], id="embedding-bfloat16", marks=pytest.mark.slow),
        pytest.param("reranker", ["--bfloat16", "--recompute"], id="reranker-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_command_lowers_the_loss_and_its_checkpoint_is_everybodys(
    kind, extra, embedding_dir, reranker_dir, data, tmp_path
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if extra[:1] == ["--lora"]:
        pytest.importorskip("peft")
    directory = embedding_dir if kind == "embedding" else reranker_dir
    out = tmp_path / "out"
    flags = ["--epochs", "10", "--batch-size", "4", "--learning-rate", "2e-3"]
    flags += ["--dims", "64", "32"] if kind == "embedding" else []
    assert main(["train", str(directory), str(data), "-o", str(out), *flags, *extra]) == 0
    rows = recorded(out / "training")
    first, last = (sum(row["loss"] for row in part) / len(part) for part in (rows[:4], rows[-4:]))
    assert len(rows) == 20
    assert last < 0.7 * first

    assert parity(out, dtype="float32").ok  # transformers opens it and gives the same
    texts = [e.positive for e in EXAMPLES]
    if kind == "embedding":
        ours = Embedder.from_pretrained(out, dtype="float32").encode(texts)
        peer = sentence_transformers.SentenceTransformer(str(out), device="cpu", model_kwargs={"dtype": "float32"})
        theirs = peer.encode(texts)
        assert abs(ours - theirs).max() <= tolerances.EMBEDDING_FP32
        assert abs(ours - Embedder.from_pretrained(directory, dtype="float32").encode(texts)).max() > 1e-3
    if extra[:1] == ["--lora"]:
        same_as_peft(kind, directory, out)


def same_as_peft(kind, directory, out):
    """The saved adapter, opened by peft and transformers, finds its base model and is the merged checkpoint."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForFeatureExtraction
    from transformers import AutoModel, AutoModelForCausalLM

    auto_peft = AutoPeftModelForFeatureExtraction if kind == "embedding" else AutoPeftModelForCausalLM
    auto = AutoModel if kind == "embedding" else AutoModelForCausalLM
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        plain = auto.from_pretrained(directory, dtype=torch.float32)(ids)[0]
        adapted = auto_peft.from_pretrained(out / "adapter", dtype=torch.float32)(ids)[0]
        merged = auto.from_pretrained(out, dtype=torch.float32)(ids)[0]
    # The merged checkpoint is stored in bfloat16, so it is nearer to the adapted model than that is to the plain one.
    assert (merged - adapted).norm() < 0.2 * (adapted - plain).norm()
    if kind == "embedding":
        sentence_transformers = pytest.importorskip("sentence_transformers")
        peer = sentence_transformers.SentenceTransformer(str(out / "adapter"), model_kwargs={"dtype": "float32"})
        theirs = peer.encode(["gold is a metal"], convert_to_tensor=True)
        ours, plain = (
            Embedder.from_pretrained(path, dtype="float32").encode(["gold is a metal"], convert_to_tensor=True)
            for path in (out, directory)
        )
        assert (ours - theirs).norm() < 0.2 * (theirs - plain).norm()
    with umask(0o022) as mask:
        assert {path.stat().st_mode & 0o777 for path in (out / "adapter").rglob("*.*")} == {0o666 & ~mask}


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradient_of_one(embedding_dir, data, tmp_path):
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "qwen3core", "train", str(embedding_dir)]
        flags = ["--epochs", "3", "--batch-size", "4", "--learning-rate", "1e-3", "--batch-tokens", "60"]
        done = subprocess.run(
            [*command, str(data), "-o", str(out), *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr
        found[processes] = [row[of] for row in recorded(out / "training") for of in ("loss", "grad_norm")]
    assert found[2] == pytest.approx(found[1], rel=tolerances.LOSS_FP32)
    assert len(set(found[1])) == 12


def test_data_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    turn = lambda text, role="user": [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {"query": "a", "response": "b"},
        {"query": "a", "response": "b", "rejected_response": "c"},
        {"query": "a", "response": "b", "rejected_response": ["c", "d"]},
        {
            "messages": [*turn("Find b", "system"), *turn("a")],
            "positive_messages": [turn("b", "assistant"), turn("e")],
            "negative_messages": [turn("c")],
        },
    ]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert read_examples([path]) == [
        Example("a", "b"),
        Example("a", "b", ("c",)),
        Example("a", "b", ("c", "d")),
        Example("a", "b", ("c",), "Find b"),
        Example("a", "e", ("c",), "Find b"),
    ]


def test_broken_rows_are_all_named_before_training(embedding_dir, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"query": "a", "response": "b"}',
        '{"query": "a"}',
        "{",
        "[1]",
        '{"query": "a", "response": "b", "rejected_response": [""]}',
        '{"messages": [], "positive_messages": [[{"role": "user", "content": "x"}]]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"messages": [{"role": "robot", "content": "x"}], "positive_messages": []}',
        '{"query": "a", "response": "b", "rejected_response": ["c", "b"]}',
        '{"query": "a \\ud800", "response": "b"}',
    ]
    path.write_text("\n".join(rows), "utf-8")
    out = tmp_path / "out"
    assert main(["train", str(embedding_dir), str(path), "-o", str(out)]) == 2
    said = capsys.readouterr().err
    for line, reason in [
        (2, "response: expected a text, found None"),
        (3, "expected JSON, found '{'"),
        (4, "expected an object, found [1]"),
        (5, "rejected_response: expected a text, found ''"),
        (6, "messages: expected a message of the user, found none"),
        (7, "positive_messages: expected one or more, found none"),
        (8, "messages: expected messages with a role (system, user or assistant)"),
        (9, "expected negatives that are no positives, found 'b' as both"),
        (10, "expected Unicode text, found a lone surrogate '\\ud800' at character 2"),
    ]:
        assert f"{path}, line {line}: {reason}" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epochs", [0, -3.0, math.nan, math.inf, 1e300, "1"]),
        ("batch_size", [0, -1, 2.0, True, 10**400]),
        ("batch_tokens", [0]),
        ("learning_rate", [0.0, -1e-5, math.nan, math.inf]),
        ("warmup", [-0.1, 1.1, math.nan]),
        ("weight_decay", [-1.0, math.inf]),
        ("max_grad_norm", [0.0, -1.0, math.nan]),
        ("save_every", [0]),
        ("seed", [-1, 2**32, 0.5]),
    ],
)
def test_numbers_that_are_no_options(name, values):
    for value in values:
        with pytest.raises(InputError, match=f"{name}: expected .*, found"):
            Options(**{name: value})


def test_a_learning_rate_that_is_too_high(small, tmp_path):
    model = opened(Embedder, small[Embedder])
    with pytest.raises(InputError, match=r"learning_rate 1e\+30: expected a finite loss, found nan at step"):
        train(model.model, task_of(model), Options(learning_rate=1e30, epochs=50), tmp_path)


def test_only_float32_is_trained(small, tmp_path):
    model = Embedder.from_pretrained(small[Embedder], dtype="bfloat16")
    with pytest.raises(InputError, match="expected float32 parameters that require gradients, found"):
        train(model.model, task_of(model), OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{model}"], "expected a directory other than the source's, found the same"),
        (["-o", "{model}/mine"], "expected a directory other than the source's, found one inside"),
        (["-o", "{model}/../link/mine"], "expected a directory other than the source's, found one inside"),
        (["-o", "{data}"], "expected an empty directory, or an interrupted training, found data.jsonl"),
        (["-o", "{out}", "--epochs", "nan"], "epochs: expected a finite number above 0"),
        (["-o", "{out}", "--max-length", "40000"], "max_length: expected at most 32768, the model's limit"),
        (["-o", "{out}", "--listwise"], "--listwise: expected none with a checkpoint for the job 'embedding'"),
        (["-o", "{out}", "--job", "reranker", "--dims", "64"], "--dims: expected none with a checkpoint for the job"),
        (
            ["-o", "{out}", "--batch-size", "4", "--dims", "64", "65"],
            "dims: expected an integer from 1 to 64, found 65",
        ),
        (["-o", "{out}", "--lora", "0"], "lora: expected an integer of at least 1, found 0"),
    ],
)
def test_the_command_refuses_before_it_trains(flags, message, embedding_dir, data, tmp_path, capsys):
    model = shutil.copytree(embedding_dir, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = sorted(model.iterdir())
    flags = [flag.format(model=model, out=tmp_path / "out", data=data.parent) for flag in flags]
    assert main(["train", str(model), str(data), *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(model.iterdir()) == before
    assert not (tmp_path / "out").exists()


def test_a_stored_copy_of_the_embeddings_follows_them(reranker_dir, data, tmp_path):
    """transformers ties an lm_head that a checkpoint stores beside tied embeddings only where the two are equal."""
    source, out = shutil.copytree(reranker_dir, tmp_path / "source"), tmp_path / "out"
    weights = {name: Tensors(source)[name] for name in Tensors(source)}
    weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    flags = ["--batch-size", "4", "--learning-rate", "1e-2"]
    assert main(["train", str(source), str(data), "-o", str(out), *flags]) == 0
    trained = Tensors(out)
    assert torch.equal(trained["lm_head.weight"], trained["embed_tokens.weight"])
    assert not torch.equal(trained["lm_head.weight"], weights["lm_head.weight"])
