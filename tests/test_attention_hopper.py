"""The Gluon attention for Hopper against its specification: its source on the CPU, or the kernel on such a GPU."""

import importlib.util
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_kernels import ATTENTION, cu_seqlens, obeys, randn, specification_with_lse

from qwen3core import InputError
from qwen3core.kernels import launch
from qwen3core.kernels.gallery import attention_hopper as kernel_file
from qwen3core.kernels.gallery.attention_hopper import CONFIGS, attention_hopper
from qwen3core.laboratory.gluon import interpreted

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["interpreted"] if launch.INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "interpreted":
        with interpreted():
            yield torch.device("cpu")
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU, and Triton was imported without TRITON_INTERPRET=1")
    else:
        yield torch.device("cuda")


def tensors(len_q, len_k, group=2, heads=2, dtype=torch.bfloat16, device="cpu"):
    """Random q, k and v, and what describes their sequences."""
    torch.manual_seed(0)
    q, *kv = (randn(sum(n), h, 128) for n, h in ((len_q, heads * group), (len_k, heads), (len_k, heads)))
    return [x.to(device, dtype) for x in (q, *kv)], [cu_seqlens(n, device) for n in (len_q, len_k)]


def run(x, cu, function=attention_hopper, **options):
    return function(*x, *cu, 0, 0, return_lse=True, **options)


def obeys_the_rule(found, x, causal, len_q, len_k, rows=slice(None)):
    """The rule of test_kernels.py, for the outputs' ``rows``."""
    specification = specification_with_lse(causal, len_q, len_k)
    plain, exact = (specification(*y) for y in ([t.cpu() for t in x], [t.cpu().double() for t in x]))
    obeys(*([t.double().cpu()[rows] for t in results] for results in (found, plain, exact)))


CASES = {
    **{name: lengths for name, lengths in ATTENTION.items() if name != "tiny"},
    "long": ([700, 30], [700, 650]),  # every buffer is used again
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_specification(case, group, dtype, causal, device):
    len_q, len_k = CASES[case]
    x, cu = tensors(len_q, len_k, group, 2 if group == 2 else 1, dtype, device)
    found = run(x, cu, causal=causal)
    assert [t.dtype for t in found] == [dtype, torch.float32]
    obeys_the_rule(found, x, causal, len_q, len_k)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, device):
    lengths = [300, 70], [500, 70]
    x, cu = tensors(*lengths, device=device)
    obeys_the_rule(run(x, cu, config=config), x, True, *lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sequences_do_not_see_each_other(bad, causal, device):
    x, cu = tensors([30, 70, 40], [30, 70, 140], device=device)
    clean = run(x, cu, causal=causal)
    x[0][30:100] = x[1][30:100] = x[2][30:100] = bad
    for a, b in zip(run(x, cu, causal=causal), clean, strict=True):
        assert torch.equal(a[:30], b[:30])
        assert torch.equal(a[100:], b[100:])
        assert a[30:100].isnan().any()


@pytest.mark.parametrize("causal", [True, False])
def test_stays_in_bounds(causal, device, monkeypatch):
    """Inputs and outputs between NaN: none comes in, none is overwritten, no output is left unwritten."""
    buffers = []

    def place(x):
        buffer = torch.full((x.numel() + 8192,), math.nan, dtype=x.dtype, device=x.device)
        buffers.append((buffer, buffer[4096:-4096].view(x.shape)))
        return buffers[-1][1]

    x, cu = tensors([65, 3, 1], [70, 3, 150], device=device)
    x = [place(t).copy_(t) for t in x]
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: place(new_empty(t, *a, **k)))
    run(x, cu, causal=causal)
    assert len(buffers) == 5
    for buffer, inside in buffers:
        assert buffer[:4096].isnan().all()
        assert buffer[-4096:].isnan().all()
        assert not inside.isnan().any()


def test_strided_inputs(device):
    """Views of one fused projection's output."""
    torch.manual_seed(0)
    fused = torch.randn(70, 8, 128, device=device).bfloat16()
    cu = [cu_seqlens([65, 5], device)] * 2
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    for a, b in zip(run(views, cu), run([x.contiguous() for x in views], cu), strict=True):
        assert torch.equal(a, b)


def test_without_any_key(device):
    x, cu = tensors([3, 2], [0, 5], device=device)
    out, lse = run(x, cu, causal=False)
    assert (out[:3] == 0).all()
    assert (lse[:3] == -math.inf).all()
    assert lse[3:].isfinite().all()
    x, cu = tensors([3], [0], device=device)
    out, lse = run(x, cu, causal=False)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    x, cu = tensors([], [], device=device)
    assert run(x, cu)[0].shape == (0, 4, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), "expected bfloat16 or float16"),
        (lambda x: x[..., :64], "D = 128, found torch.bfloat16, 64"),
        (lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape), "multiples of 16 bytes"),
        (lambda x: x.new_empty(5, x[0].numel() + 4)[:, :-4].unflatten(1, x.shape[1:]), "multiples of 16 bytes"),
    ],
)
def test_refuses(change, message, device):
    x, cu = tensors([5], [5], device=device)
    with pytest.raises(InputError, match=re.escape(message)):
        run([change(t) for t in x], cu)


# What the interpreter proves: each of these mistakes, planted into the kernel's source, shows.

WAIT = "        acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # p, too: it is read until then\n"
RELEASE = "        mbarrier.arrive(empty[1].index((n - 1) % STAGES))\n"
PLANTED = {
    "the next sequence is not cut off": ("FAR - length + n * BLOCK_N", "FAR - 4096 - length + n * BLOCK_N"),
    "one key too many": ("key[None, :] < seen[:, None]", "key[None, :] <= seen[:, None]"),
    "the mask comes a block late": ("if start >= full:", "if start > full:"),
    "what was summed is not scaled": ("acc = acc * alpha[:, None]", "acc = acc * 1.0"),
    "p is not rounded": ("gl.convert_layout(p.to(dtype),", "gl.convert_layout(p,"),
    "no block is waited for": ("mbarrier.wait(ready.index(n % STAGES), n // STAGES & 1)", "pass"),
    "q is not waited for": ("mbarrier.wait(ready[0].index(0), 0)", "pass"),
    "a buffer is not waited for": ("mbarrier.wait(empty.index(stage), n // STAGES & 1 ^ 1)", "pass"),
    "the wrong phase": ("n // STAGES & 1 ^ 1)", "n // STAGES & 1)"),
    "one consumer releases for both": ("empty = (barriers(STAGES, 2)", "empty = (barriers(STAGES, 1)"),
    "keys are not released": ("mbarrier.arrive(empty[0].index(n % STAGES))", "pass"),
    "values are released too early": (WAIT + RELEASE, RELEASE + WAIT),
    "scores are not waited for": ("s = warpgroup_mma_wait(1, deps=(s,))", "pass"),
    "too few bytes are expected": ("2 * q_desc.block_type.nbytes", "q_desc.block_type.nbytes"),
    "the last block is not loaded": ("for n in range(blocks):", "for n in range(blocks - 1):"),
    "rows of the next sequence are stored": ("mask=exists[:, None]", "mask=exists[:, None] | True"),
    "always the first head": ("head * GROUP, 0]", "0, 0]"),
    "both consumers take the same rows": ("first += INDEX * QUERIES", "first += 0 * QUERIES"),
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a mistake may stop a GPU")
@pytest.mark.parametrize("mistake", [None, *PLANTED])
def test_planted_mistakes_show(mistake, tmp_path):
    source = Path(kernel_file.__file__).read_text("utf-8")
    for right, wrong in [PLANTED[mistake]] if mistake else []:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    file = tmp_path / "planted.py"
    file.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("qwen3core.kernels.gallery.planted", file)
    assert spec
    assert spec.loader
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    lengths = [40, 130, 90], [300, 130, 900]
    x, cu = tensors(*lengths)
    x[1][300:430] = x[2][300:430] = math.nan  # the second sequence
    others = torch.cat((torch.arange(40), torch.arange(170, 260)))
    with nullcontext() if mistake is None else pytest.raises(Exception), interpreted():  # noqa: PT011
        obeys_the_rule(run(x, cu, planted.attention_hopper), x, True, *lengths, rows=others)
