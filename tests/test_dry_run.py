"""What runs on a GPU, run on one that is pretended: qwen3core/laboratory/pretend.py, and what it finds."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

START = """
import json, random
import torch
from qwen3core import InputError, Ops, Qwen3Config, pack
from qwen3core.laboratory import launches
from qwen3core.laboratory.pretend import WAITS
from qwen3core.model import Qwen3Model

def tiny_model(**options):
    torch.manual_seed(0)
    return Qwen3Model(Qwen3Config(50, 64, 96, 2, 4, 2, 64, 1e6, head_dim=64), "triton", **options).to("cuda")
"""


def pretended(*arguments, **environment):
    """What a program prints on the pretended GPU."""
    # As a shell would start it, not as these tests: the interpreter is chosen by who launches.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qwen3core.laboratory.pretend", *map(str, arguments)]
    environment = own | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(code):
    return json.loads(pretended("-c", START + code).splitlines()[-1])


def test_tensors_are_on_the_gpu_and_nowhere_else():
    found = answers("""
x = torch.randn(4, 3, device="cuda", requires_grad=True)
cpu = torch.randn(4, 3)
mixed = []
for wrong in (lambda: x + cpu, lambda: torch.cat([x, cpu]), lambda: x.detach().numpy()):
    try:
        wrong()
    except (RuntimeError, TypeError) as error:
        mixed.append(str(error))
moved = [cpu.to("cuda"), cpu.cuda(), cpu.to(x), torch.tensor([1.0], device="cuda"), torch.empty_like(x), x[:2] * 2]
(torch.nn.functional.softmax(x, 1) * cpu.to("cuda")).sum().backward()
moved += [x.grad, torch.nn.Linear(3, 3).to("cuda").weight]
back = [x.detach().cpu(), x.detach().to("cpu", torch.float16), x.cpu(), x.to(cpu)]
print(json.dumps([[str(t.device) for t in moved], [str(t.device) for t in back], mixed, x.is_cuda]))
""")
    assert found[0] == ["cuda:0"] * 8
    assert found[1] == ["cpu"] * 4
    assert [message.split(":")[0] for message in found[2]] == ["add", "cat", "can't convert cuda"]
    assert found[3] is True


def test_waits_are_seen():
    found = answers("""
x = torch.arange(4.0, device="cuda")
waits = []
for run in (
    lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: bool(x[0]), lambda: x[x > 1],
    lambda: torch.equal(x, x), lambda: torch.tensor([1], device="cuda"), lambda: x.nonzero(),
    lambda: torch.cuda.synchronize(),
    lambda: x * 2, lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True), lambda: x[:2].clone(),
):
    WAITS.clear()
    run()
    waits.append(len(WAITS))
print(json.dumps(waits))
""")
    assert found == [1] * 9 + [0] * 3


@pytest.mark.parametrize(
    "call", ["embed(batch, dim=40)", "embed(prefixed)", "scores(batch, direction)", "tokens(batch)"]
)
def test_forward_makes_the_host_wait_for_nothing(call):
    """Not at the first call either, but for the angles of RoPE, which are computed once."""
    found = answers(f"""
model = tiny_model()
model.embed(pack([[1]], device="cuda"))
WAITS.clear()
batch = pack([[1, 2, 3], [4], [5, 6]], device="cuda")
prefixed = pack([[1, 2, 3], [1, 2, 4, 5]], prefixes=[(1, 2)] * 2, device="cuda")
direction = model.score_weight([3, 4]).detach()
before = list(WAITS)
with torch.no_grad():
    out = model.{call}
print(json.dumps([before, WAITS]))
""")
    assert found == [[], []]


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_waits_are_those_of_a_call_not_of_a_batch(kind):
    """The host waits for the result, and to see that weights and result are finite."""
    found = answers(f"""
from qwen3core import Embedder, Reranker
opened = {"Embedder" if kind == "embedding" else "Reranker"}.from_pretrained(
    "tiny-{kind}", dtype="float32", ops="triton", device="cuda"
)
texts = ["gravity", "a violin", "rain fell on the roof", "the sun", "planets move"]
waits = []
for batch_tokens in (4096, 4096, 100):
    WAITS.clear()
    if isinstance(opened, Embedder):
        opened.encode(texts, batch_tokens=batch_tokens // 4)
    else:
        opened.predict([("what falls?", text) for text in texts], batch_tokens=batch_tokens)
    waits.append([wait.split(",")[0] for wait in WAITS])
print(json.dumps(waits[1:]))
""")
    assert found[0] == found[1]
    assert found[0][-1] == "to cpu"
    assert len(found[0]) <= 4


def test_few_compilations_serve_all_batches():
    """A thousand batches of other lengths, with and without shared prefixes, some with gradients."""
    found = answers("""
from triton.runtime.interpreter import InterpretedFunction
InterpretedFunction.run = lambda *args, **options: None  # only what they are specialised for is looked at
model, chance = tiny_model(), random.Random(0)
direction = model.score_weight([3, 4]).detach()
shapes = set()
while len(shapes) < 1000:
    lengths = tuple(chance.choice((1, 2, 15, 16, 17, 64, chance.randint(1, 300))) for _ in range(chance.randint(1, 20)))
    shapes.add(lengths)
    sequences = [[7, 8] + [9] * n for n in lengths]
    batch = pack(sequences, prefixes=[(7, 8)] * len(lengths) if len(shapes) % 2 else None, device="cuda")
    with torch.set_grad_enabled(len(shapes) % 100 == 0):
        vectors, scores = model.embed(batch), model.scores(batch, direction)
        if len(shapes) % 100 == 0:
            (vectors.sum() + scores.sum()).backward()
print(json.dumps({name: len(keys) for name, keys in launches.KEYS.items()}))
""")
    assert found == {name: 2 if name.startswith("rms_norm") else 1 for name in KERNELS}  # that one with an add, too


KERNELS = {
    *("attention_kernel", "dq_kernel", "dkdv_kernel", "rms_norm_kernel", "rms_norm_backward_kernel"),
    *("qk_norm_rope_kernel", "qk_norm_rope_backward_kernel", "swiglu_kernel", "swiglu_backward_kernel"),
    *("norm_pool_kernel", "norm_score_kernel"),
}


def test_launches_compile_as_they_were_made(tmp_path):
    """With the sizes of 0.6B, in bfloat16, forward and backward: no spills, and shared memory that is there."""
    code = """
import dataclasses
from qwen3core.config import OFFICIAL_SIZES
config = dataclasses.replace(OFFICIAL_SIZES["0.6B"], vocab_size=50, num_hidden_layers=2)
model, batch = Qwen3Model(config, "triton").to("cuda", torch.bfloat16), pack([[1, 2, 3], [4]], device="cuda")
(model.embed(batch).sum() + model.scores(batch, model.score_weight([3, 4]).detach()).sum()).backward()
"""
    pretended("--launches", tmp_path, "-c", START + code)
    command = [sys.executable, "-m", "qwen3core.laboratory.launches", tmp_path, "--target", "sm_90"]
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[1] for line in done.stdout.splitlines()} == KERNELS


LONG = [f"{dtype}-{case}" for dtype in ("float32", "float16", "bfloat16") for case in ("tile", "fewer")]
"""Cases of test_attention that take minutes, by how they begin; its others run."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The folder of what the suite for GPUs wrote, and what it said: all three stages, in minute sizes."""
    if "DRY_RUN" not in os.environ:
        pytest.skip("the whole suite on a pretended GPU takes half an hour: DRY_RUN=1 asks for it")
    folder = tmp_path_factory.mktemp("suite")
    said = pretended(
        "--launches",
        folder / "launches",
        "bench/gpu_suite.sh",
        SIZE="tiny",
        OUT=str(folder / "results"),
        CHECKPOINTS=str(folder),
        PYTEST_ADDOPTS=" ".join(f"--deselect tests/test_kernels.py::test_attention[torch.{case}" for case in LONG),
    )
    return folder, said


def test_every_step_of_the_suite_runs(suite):
    _, said = suite
    steps = dict(re.findall(r"^(\S+) +status (\d+)", said, re.MULTILINE))
    models, benches = ("tiny-embedding", "tiny-reranker"), ("bench.run", "contenders", "tune", "plot")
    assert steps == dict.fromkeys(("environment", "bfloat16", "auto", *models, "tests", *benches), "0")
    assert "memcheck     not run" in said


def test_every_test_of_the_suite_runs(suite):
    """None is left out, and none of the processes is without one."""
    ends = re.findall(r"^.*\b(?:passed|failed|error|deselected)\b.* in .*s.*$", suite[1], re.MULTILINE)
    assert len(ends) == 3 + 4
    for end in ends:
        assert re.match(r"(\d+) passed, \d+ deselected", end), end


def test_every_bench_of_the_suite_writes_numbers(suite):
    folder, _ = suite
    [device] = (folder / "results").iterdir()
    assert device.name == "pretended-gpu"
    for path in device.glob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        assert found["environment"]["device"] == "pretended GPU"
        engines = [row for row in found["rows"] if "p50" in row]
        assert engines, path
    names = {path.stem for path in device.glob("*.json")}
    kernels = {"attention", "attention_backward", "rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu"}
    kernels |= {"norm_pool", "norm_pool_mean", "norm_score"}
    assert names == {f"{name}{end}" for name in kernels for end in ("", "_tune")} | {
        f"{workload}_bfloat16" for workload in ("corpus", "rerank", "query")
    }
    assert {path.name for path in device.glob("*.png")} >= {"attention.png", "memory.png", "engines.png"}
