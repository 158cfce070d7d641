"""Every Triton kernel against its specification: in the interpreter where there is no GPU, on the GPU where there is.

The rule: the error against float64 is at most OPS_RATIO times that of the plain reference in the same dtype, for each
output and each gradient (Frobenius norms).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from tolerances import CANCELLED, OPS_RATIO, REORDERED_FP32

from qwen3core import InputError, Ops, capture, edit, load_model, pack, reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.commands import main
from qwen3core.kernels import launch
from qwen3core.kernels import qk_norm_rope as qk_norm_rope_file
from qwen3core.kernels import rms_norm as rms_norm_file
from qwen3core.kernels.attention import CONFIGS, attention, attention_backward, merge
from qwen3core.kernels.pooling import MEAN_CONFIGS, norm_pool, norm_score
from qwen3core.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_
from qwen3core.kernels.rms_norm import add_rms_norm, rms_norm
from qwen3core.kernels.swiglu import swiglu
from qwen3core.laboratory.interpreter import gpu_arithmetic, use_exact_arithmetic
from qwen3core.reference import declare

if launch.INTERPRETED:
    use_exact_arithmetic()

EPS = 1e-6
EACH_DTYPE = pytest.mark.parametrize("dtype", launch.KERNEL_DTYPES, ids=str)


def slow(*values):
    """A case that runs only where slow tests are asked for."""
    return pytest.param(*values, marks=pytest.mark.slow)


MODES = ["exact", 0, slow(1)] if launch.INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=MODES, ids=lambda mode: mode if isinstance(mode, str) else f"GPU arithmetic, seed {mode}")
def device(request):
    """Where kernels run: the CPU through Triton's interpreter, exact or erring as a GPU may; or a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1")
    with nullcontext() if isinstance(request.param, str) else gpu_arithmetic(request.param):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


def cu_seqlens(lengths, device="cpu"):
    return build_cu_seqlens(lengths).to(device)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def results(function, tensors):
    """Outputs of a function, and the gradients of its tensors for fixed random cotangents; all float64 on the CPU."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in out]
    grads = torch.autograd.grad(out, leaves, cotangents)
    return [x.dtype for x in out], [x.detach().double().cpu() for x in (*out, *grads)]


def judge(ours, specification, tensors, dtype, device):
    """The rule of this file; tensors are float64, ours and the specification are called with them as arguments."""
    rounded = [x.to(dtype) for x in tensors]
    _, exact = results(specification, [x.double() for x in rounded])
    dtypes, plain = results(specification, rounded)
    ours_dtypes, found = results(ours, [x.to(device) for x in rounded])
    assert ours_dtypes == dtypes
    obeys(found, plain, exact)


def obeys(found, plain, exact):
    cancelled = CANCELLED * max(x.norm() for x in exact)
    for index, (a, b, x) in enumerate(zip(found, plain, exact, strict=True)):
        assert a.shape == x.shape
        error, of_plain = (a - x).norm(), (b - x).norm()
        assert error <= OPS_RATIO * of_plain + cancelled, f"result {index}: {error:.2e}, plain PyTorch {of_plain:.2e}"


def nearly_equal(a, b):
    assert (a - b).norm() <= REORDERED_FP32 * b.norm()


ATTENTION = {
    "tile edges": ([1, 64, 129], [1, 64, 129]),
    "odd": ([1, 2, 63, 64, 65, 127, 129, 300], [1, 2, 63, 64, 65, 127, 129, 300]),
    "small": ([5, 70], [5, 70]),
    "one token": ([1], [1]),
    "tiny": ([1, 2, 3] * 8, [1, 2, 3] * 8),
    "fewer queries": ([1, 63, 1, 0, 64], [300, 65, 1, 7, 129]),
    "empty sequences": ([0, 3, 0], [0, 3, 0]),
}


def attention_cases(quick):
    """Every case in groups of every size and every dtype, both masks: the quick ones, or those that repeat."""
    for case, group, dtype, causal in itertools.product(ATTENTION, (1, 2, 4, 8), launch.KERNEL_DTYPES, (True, False)):
        chosen = case not in ("odd", "tiny") and (group == 2 or (case == "tile edges" and dtype == torch.float32))
        chosen = chosen and (causal or case in ("tile edges", "fewer queries"))
        if chosen == quick and (quick or causal or group <= 2):  # without a mask, a group is only an index
            yield pytest.param(case, group, dtype, causal, id=f"{dtype}-{case}-{group}-{causal}")


@pytest.mark.parametrize(("case", "group", "dtype", "causal"), list(attention_cases(quick=True)))
def test_attention(case, group, dtype, causal, device):
    torch.manual_seed(0)
    len_q, len_k = ATTENTION[case]
    heads, D = (2, 128) if group == 2 else (1, 64)
    tensors = [randn(sum(len_q), heads * group, D), *(randn(sum(len_k), heads, D) for _ in range(2))]

    def run(op, where):
        rest = (cu_seqlens(len_q, where), cu_seqlens(len_k, where), max(len_q), max(len_k))
        return lambda q, k, v: op(q, k, v, *rest, causal=causal)

    judge(run(attention, device), run(reference.attention, "cpu"), tensors, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", MODES[:1], indirect=True)
@pytest.mark.parametrize(("case", "group", "dtype", "causal"), list(attention_cases(quick=False)))
def test_attention_in_more_cases(case, group, dtype, causal, device):
    test_attention(case, group, dtype, causal, device)


def specification_with_lse(causal, len_q, len_k):
    """Out and log-sum-exp of one sequence after another, in plain PyTorch."""

    def run(q, k, v):
        outs, lses = [], []
        groups = q.shape[1] // k.shape[1]
        for rows_q, rows_k in reference.sequences(cu_seqlens(len_q), cu_seqlens(len_k)):
            queries, keys, values = (x.transpose(0, 1) for x in (q[rows_q], k[rows_k], v[rows_k]))
            keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
            scores = reference.at_least_float32(queries @ keys.transpose(1, 2) * q.shape[2] ** -0.5)
            if causal:
                scores = scores.masked_fill(~reference.visible(queries, keys), -torch.inf)
            outs.append((scores.softmax(-1).to(q.dtype) @ values).transpose(0, 1))
            lses.append(scores.logsumexp(-1).transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)

    return run


@pytest.mark.parametrize("causal", [True, False])
@EACH_DTYPE
def test_attention_lse(causal, dtype, device):
    torch.manual_seed(0)
    len_q, len_k = [3, 40, 65], [70, 40, 130]
    tensors = [randn(108, 2, 64), randn(240, 1, 64), randn(240, 1, 64)]
    cu = cu_seqlens(len_q, device), cu_seqlens(len_k, device)
    judge(
        lambda q, k, v: attention(q, k, v, *cu, 65, 130, causal=causal, return_lse=True),
        specification_with_lse(causal, len_q, len_k),
        tensors,
        dtype,
        device,
    )


def test_shared_prefix_is_attended_once_and_merged(device):
    """Prefix without mask for all continuations at once, continuations causally, merged: the whole; gradients too."""
    torch.manual_seed(0)
    prefix, rest = 70, [5, 33]
    whole = [randn(2 * prefix + 38, heads, 64).float() for heads in (2, 1, 1)]
    for x in whole:
        x[75 : 75 + prefix] = x[:prefix]  # the second sequence begins like the first
    after = torch.cat((torch.arange(prefix, 75), torch.arange(75 + prefix, 75 + prefix + 33)))

    def once(q, k, v):
        cu = cu_seqlens([75, 103], device)
        return attention(q, k, v, cu, cu, 103, 103)[after]

    def merged(q, k, v):
        own = cu_seqlens(rest, device)
        one = cu_seqlens([38], device)
        shared = attention(
            q[after], k[:prefix], v[:prefix], one, cu_seqlens([prefix], device), 38, 70, causal=False, return_lse=True
        )
        ours = attention(q[after], k[after], v[after], own, own, 33, 33, return_lse=True)
        return merge(*shared, *ours)[0]

    _, (a, *grads_a) = results(once, [x.to(device) for x in whole])
    _, (b, *grads_b) = results(merged, [x.to(device) for x in whole])
    nearly_equal(a, b)
    for x, y in zip(grads_a, grads_b, strict=True):  # the shared rows' gradients fall on the first copy
        x[:prefix] += x[75 : 75 + prefix]
        x[75 : 75 + prefix] = 0
        nearly_equal(x, y)


def test_attention_without_any_key(device):
    q, kv = torch.randn(3, 2, 64, device=device), torch.randn(0, 1, 64, device=device)
    empty = torch.zeros(2, dtype=torch.int32, device=device)
    out, lse = attention(q, kv, kv, cu_seqlens([3], device), empty, 3, 0, causal=False, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert attention(kv, kv, kv, empty, empty, 0, 0).shape == (0, 1, 64)  # the empty batch


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", CONFIGS)
def test_every_configuration_of_attention_is_right(kernel, causal, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(133, heads, 64, device=device, requires_grad=True) for heads in (2, 1, 1))
    cu = cu_seqlens([130, 3], device)
    out, lse = attention(q, k, v, cu, cu, 130, 130, causal=causal, return_lse=True)
    saved = (torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, cu, cu, causal)
    expected = (out,) if kernel == "forward" else attention_backward(*saved, [], [])
    for config in {c for configs in CONFIGS[kernel].values() for c in configs}:
        if kernel == "forward":
            found = (attention(q, k, v, cu, cu, 130, 130, causal=causal, config=config),)
        else:
            found = attention_backward(*saved, *((config, []) if kernel == "dq" else ([], config)))
        for a, b in zip(found, expected, strict=True):
            nearly_equal(a, b)


@pytest.mark.parametrize("config", MEAN_CONFIGS, ids=str)
def test_every_configuration_of_the_mean_is_right(config, device):
    torch.manual_seed(0)
    x, w, cu = (
        torch.randn(170, 100, device=device),
        torch.randn(100, device=device),
        cu_seqlens([1, 5, 133, 31], device),
    )
    found, expected = (norm_pool(x, w, EPS, cu, 70, True, mean=True, config=c) for c in (config, MEAN_CONFIGS[0]))
    nearly_equal(found, expected)


@pytest.mark.parametrize("config", rms_norm_file.BACKWARD_CONFIGS, ids=str)
def test_every_configuration_of_rms_norms_backward_is_right(config, device):
    torch.manual_seed(0)
    dy, x, w = torch.randn(90, 100, device=device), torch.randn(90, 100, device=device), torch.randn(100, device=device)
    runs = [rms_norm_file.rms_norm_backward(dy, dy, x, w, EPS, list(c)) for c in (config, ())]
    for a, b in zip(*runs, strict=True):
        nearly_equal(a, b)


@pytest.mark.parametrize("config", qk_norm_rope_file.BACKWARD_CONFIGS, ids=str)
def test_every_configuration_of_qk_norm_ropes_backward_is_right(config, device):
    torch.manual_seed(0)
    q, k, w, cos = (torch.randn(*s, device=device) for s in ((9, 4, 64), (9, 2, 64), (64,), (9, 64)))
    runs = [qk_norm_rope_file.qk_norm_rope_backward(q, k, q, k, w, w, EPS, cos, cos, list(c)) for c in (config, ())]
    for a, b in zip(*runs, strict=True):
        nearly_equal(a, b)


@pytest.fixture
def two_programs(monkeypatch):
    """Few programs for the norms' backward, so that each goes over several tiles."""
    for module, config in (("rms_norm", (4096, 4, 2)), ("qk_norm_rope", (2, 4))):
        monkeypatch.setattr(f"qwen3core.kernels.{module}.BACKWARD_CONFIGS", (config,))


@pytest.mark.parametrize("shape", [(5,), (1, 64), (150, 100), (7, 3, 128), (65, 2, 16), (0, 40)], ids=str)
@EACH_DTYPE
@pytest.mark.usefixtures("two_programs")
def test_rms_norm(shape, dtype, device):
    torch.manual_seed(0)
    tensors = [randn(*shape) * 3, randn(shape[-1])]
    judge(lambda x, w: rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), tensors, dtype, device)


@pytest.mark.parametrize("shape", [(1, 64), (33, 100), (7, 3, 128)], ids=str)
@EACH_DTYPE
def test_add_rms_norm(shape, dtype, device):
    torch.manual_seed(0)

    def specification(x, w, residual):
        total = x + residual
        return reference.rms_norm(total, w, EPS), total

    tensors = [randn(*shape), randn(shape[-1]), randn(*shape) * 2]
    judge(lambda x, w, r: add_rms_norm(x, w, EPS, r), specification, tensors, dtype, device)


def rounding_of_rms_norm(dtype, device):
    x, residual, w = (randn(*shape).to(dtype) for shape in ((200, 64), (200, 64), (64,)))
    y, total = add_rms_norm(x.to(device), w.to(device), EPS, residual.to(device))
    assert torch.equal(total.cpu(), x + residual)
    late = (x + residual).float()
    late = (late * torch.rsqrt(late.pow(2).mean(-1, keepdim=True) + EPS) * w.float()).to(dtype)
    return y, reference.rms_norm(x + residual, w, EPS), late


def rounding_of_qk_norm_rope(dtype, device):
    q, w = randn(70, 2, 64).to(dtype), randn(64).to(dtype)
    angles = randn(70, 32).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    on_device, weight = q.to(device), w.to(device)
    found, _ = qk_norm_rope(on_device, on_device, weight, weight, EPS, cos.to(device), sin.to(device))
    wide = [t.float() for t in (cos, sin)]
    normed = reference.rms_norm(q, w, EPS).float()
    late = reference.rms_norm(q.float(), torch.ones(64), EPS).to(dtype).float() * w.float()
    return found, *(reference.rope(y, *wide).to(dtype) for y in (normed, late))


def rounding_of_swiglu(dtype, device):
    gate, up = randn(2, 70, 64).to(dtype)
    late = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
    return swiglu(gate.to(device), up.to(device)), reference.swiglu(gate, up), late


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", [rounding_of_rms_norm, rounding_of_qk_norm_rope, rounding_of_swiglu])
def test_rounds_where_the_specification_does(of, dtype, device):
    """Bit for bit, for what an error norm hardly sees; a last bit may differ by the order of a sum."""
    torch.manual_seed(0)
    found, expected, late = of(dtype, device)
    assert (found.cpu() == expected).float().mean() > 0.999
    assert (found.cpu() == late).float().mean() < 0.95


@pytest.mark.parametrize("counts", [(1, 4, 2), (9, 6, 3), (7, 1, 1), slow((70, 1, 1))], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@EACH_DTYPE
@pytest.mark.usefixtures("two_programs")
def test_qk_norm_rope(counts, D, dtype, device):
    torch.manual_seed(0)
    T, hq, hkv = counts
    cos_sin = torch.randn(2, T, D, dtype=torch.float64).to(dtype)

    def run(op):
        return lambda q, k, a, b: op(q, k, a, b, *cos_sin.to(q))

    def specification(q, k, a, b, cos, sin):
        return tuple(reference.rope(reference.rms_norm(x, w, EPS), cos, sin) for x, w in ((q, a), (k, b)))

    def ours(q, k, a, b, cos, sin):
        return qk_norm_rope(q, k, a, b, EPS, cos, sin)

    tensors = [randn(T, hq, D) * 2, randn(T, hkv, D), randn(D), randn(D)]
    judge(run(ours), run(specification), tensors, dtype, device)


def test_qk_norm_rope_in_place(device):
    torch.manual_seed(0)
    q, k, a, b = (torch.randn(*s, device=device) for s in ((9, 6, 64), (9, 3, 64), (64,), (64,)))
    cos, sin = torch.randn(2, 9, 64, device=device)
    expected = qk_norm_rope(q, k, a, b, EPS, cos, sin)
    qk_norm_rope_(q, k, a, b, EPS, cos, sin)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (17, 1500), (0, 8)], ids=str)
@EACH_DTYPE
def test_swiglu(shape, dtype, device):
    torch.manual_seed(0)
    judge(swiglu, reference.swiglu, [randn(*shape) * 3, randn(*shape)], dtype, device)


def mean_pool(x, cu_seqlens, dim, normalize):
    parts = [part.mean(0) for part in reference.at_least_float32(x).split(cu_seqlens.diff().tolist())]
    pooled = torch.stack(parts)[:, :dim]
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


@pytest.mark.parametrize("mean", [False, True], ids=["last", "mean"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
@pytest.mark.parametrize("dim", [1, 33, 100])
@EACH_DTYPE
def test_norm_pool(dim, normalize, mean, dtype, device):
    torch.manual_seed(0)
    counts = [1, 5, 9, 2]
    pool = mean_pool if mean else reference.pool
    judge(
        lambda x, w: norm_pool(x, w, EPS, cu_seqlens(counts, device), dim, normalize, mean=mean),
        lambda x, w: pool(reference.rms_norm(x, w, EPS), cu_seqlens(counts), dim, normalize),
        [randn(17, 100), randn(100)],
        dtype,
        device,
    )


@EACH_DTYPE
def test_norm_score(dtype, device):
    torch.manual_seed(0)
    counts = [1, 5, 9, 2]
    direction = randn(100) * 0.1

    def specification(x, w, d):
        pooled = reference.pool(reference.rms_norm(x, w, EPS), cu_seqlens(counts), 100, False)
        return torch.sigmoid(pooled @ d.to(pooled.dtype))

    judge(
        lambda x, w, d: norm_score(x, w, EPS, cu_seqlens(counts, device), d.float()),
        specification,
        [randn(17, 100), randn(100), direction],
        dtype,
        device,
    )


def test_near_ties_of_the_reranker_survive(device):
    """Logits that differ by a part in a million of their size: the difference is taken in float32."""
    x, w = torch.ones(1, 64, device=device), torch.ones(64, device=device)
    yes_no = torch.full((2, 64), 100.0, device=device)
    yes_no[0, 0] += 1e-4
    found = norm_score(x, w, EPS, cu_seqlens([1], device), reference.yes_minus_no(yes_no))
    assert 0.5 < found.item() < 0.50005


@pytest.mark.parametrize("ops", ["attention", "swiglu", "qk_norm_rope", "rms_norm"])
def test_non_contiguous_inputs(ops, device):
    """Views of one fused matmul's output, as a fused qkv or gate_up projection gives them."""
    torch.manual_seed(0)
    T = 70 if ops == "attention" else 9
    fused = torch.randn(T, 8, 64, dtype=torch.float64).float()
    cu = cu_seqlens([T - 5, 5], device)
    w = torch.randn(64, device=device)
    cos_sin = torch.randn(2, T, 64, device=device)
    functions = {
        "attention": lambda x: attention(x[:, :4], x[:, 4:6], x[:, 6:], cu, cu, 65, 65),
        "swiglu": lambda x: swiglu(x.flatten(1)[:, :256], x.flatten(1)[:, 256:]),
        "qk_norm_rope": lambda x: qk_norm_rope(x[:, :4], x[:, 4:6], w, w, EPS, *cos_sin),
        "rms_norm": lambda x: rms_norm(x[::2, 1:3], w, EPS),
    }
    function = functions[ops]

    def contiguous(x):
        """The same views, copied: only their strides differ."""
        with pytest.MonkeyPatch.context() as patch:
            getitem = torch.Tensor.__getitem__
            patch.setattr(torch.Tensor, "__getitem__", lambda t, i: getitem(t, i).contiguous())
            return function(x)

    _, found = results(function, [fused.to(device)])
    _, expected = results(contiguous, [fused.to(device)])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_backward_is_deterministic(device):
    torch.manual_seed(0)
    cu = cu_seqlens([130, 3, 40], device)
    tensors = [torch.randn(173, heads, 64, device=device) for heads in (4, 1, 1)]
    runs = [results(lambda q, k, v: attention(q, k, v, cu, cu, 130, 130), tensors)[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_sequences_do_not_see_each_other(device):
    """NaN in one sequence reaches no other, forward or backward."""
    torch.manual_seed(0)
    counts = [30, 70, 40]
    cu = cu_seqlens(counts, device)
    tensors = [torch.randn(140, heads, 64, device=device) for heads in (2, 1, 1)]
    _, clean = results(lambda q, k, v: attention(q, k, v, cu, cu, 70, 70), tensors)
    for x in tensors:
        x[30:100] = math.nan
    _, found = results(lambda q, k, v: attention(q, k, v, cu, cu, 70, 70), tensors)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[:30], b[:30])
        assert torch.equal(a[100:], b[100:])
        assert a[30:100].isnan().all()


@pytest.fixture
def poisoned(monkeypatch):
    """Tensors inside larger buffers of NaN; ``check`` fails on a write outside and on an output left unwritten."""
    margin, made = 4096, []

    def place(x, fill):
        if not x.is_floating_point():
            return x
        buffer = torch.full((x.numel() + 2 * margin,), math.nan, dtype=x.dtype, device=x.device)
        inside = buffer[margin : margin + x.numel()].view(x.shape)
        if fill:
            inside.copy_(x)
        made.append((buffer, inside, fill))
        return inside

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: place(new_empty(x, *a, **k), False))
    monkeypatch.setattr(torch, "empty_like", lambda x: place(empty_like(x), False))

    def check():
        outputs = 0
        for buffer, inside, fill in made:
            assert buffer[:margin].isnan().all()
            assert buffer[len(buffer) - margin :].isnan().all()
            assert not inside.isnan().any()
            outputs += not fill
        assert outputs > 0

    return lambda *shape: place(torch.randn(*shape[:-1], device=shape[-1]), True), check


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [slow(64), 128])
@pytest.mark.parametrize("counts", [([65, 3, 1], [65, 3, 1]), ([1, 3, 70], [130, 3, 90])], ids=str)
def test_attention_stays_in_bounds(counts, D, causal, device, poisoned):
    tensor, check = poisoned
    q, k, v = (
        tensor(sum(n), heads, D, device) for n, heads in zip((counts[0], *[counts[1]] * 2), (4, 2, 2), strict=True)
    )
    cu_q, cu_k = cu = [cu_seqlens(n, device) for n in counts]
    out, lse = attention(q, k, v, cu_q, cu_k, 70, 130, causal=causal, return_lse=True)
    attention_backward(tensor(*out.shape, device), tensor(*lse.shape, device), q, k, v, out, lse, *cu, causal, [], [])
    check()


def test_other_kernels_stay_in_bounds(device, poisoned):
    tensor, check = poisoned
    x, w, q, k, a = (tensor(*s, device) for s in ((9, 100), (100,), (9, 3, 64), (9, 1, 64), (64,)))
    leaves = [t.requires_grad_() for t in (x, w, q, k, a)]
    cu = cu_seqlens([1, 5, 3], device)
    cos, sin, direction = tensor(9, 64, device), tensor(9, 64, device), tensor(100, device)
    outputs = [
        rms_norm(x, w, EPS),
        *add_rms_norm(x, w, EPS, x),
        *qk_norm_rope(q, k, a, a, EPS, cos, sin),
        swiglu(x, x),
        norm_pool(x, w, EPS, cu, 33, True),
        norm_pool(x, w, EPS, cu, 33, True, mean=True),
        norm_score(x, w, EPS, cu, direction),
    ]
    torch.autograd.grad(outputs, leaves, [tensor(*o.shape, device) for o in outputs])
    check()


OPCHECK: dict[str, Callable[[Callable], Sequence]] = {
    "attention": lambda t: (
        t(9, 4, 64),
        t(9, 2, 64),
        t(9, 2, 64),
        cu_seqlens([4, 5]),
        cu_seqlens([4, 5]),
        True,
        False,
        [],
    ),
    "rms_norm": lambda t: (t(9, 64), t(64), EPS, None, [4096, 4]),
    "rms_norm ": lambda t: (t(9, 64), t(64), EPS, t(9, 64), [4096, 4]),
    "qk_norm_rope": lambda t: (t(9, 4, 64), t(9, 2, 64), t(64), t(64), EPS, *torch.randn(2, 9, 64), [4, 8]),
    "qk_norm_rope_": lambda t: [
        x.detach() if isinstance(x, torch.Tensor) else x for x in OPCHECK["qk_norm_rope"](t)[:-1]
    ],
    "swiglu": lambda t: (t(9, 64), t(9, 64), [8, 512, 8]),
    "norm_pool": lambda t: (t(9, 64), t(64), EPS, cu_seqlens([4, 5]), 32, True, False, False, [4, 1]),
    "norm_pool ": lambda t: (t(9, 64), t(64), EPS, cu_seqlens([4, 5]), 32, True, True, False, [4, 2]),
    "norm_score": lambda t: (t(9, 64), t(64), EPS, cu_seqlens([4, 5]), t(64), False, [4, 1]),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_registration(name, device):
    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    args = [x.to(device) if isinstance(x, torch.Tensor) and not x.requires_grad else x for x in OPCHECK[name](leaf)]
    torch.library.opcheck(getattr(torch.ops.qwen3core, name.strip()).default, tuple(args))


@pytest.mark.parametrize("counts", [(6, 1, 9)], ids=str)
@pytest.mark.parametrize("kind", ["embedding", slow("reranker")])
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_whole_model(dtype, kind, counts, device, request):
    """ops="triton" is as exact as ops="reference", fused and hooked, embedding and reranker, values and gradients."""
    directory = request.getfixturevalue(f"{kind}_dir")

    def run(ops, dtype, device):
        model = load_model(directory, dtype=dtype, ops=ops, device=device, lm_head=kind == "reranker")
        batch = pack([[*range(200 * n + 3, 200 * n + 3 + count)] for n, count in enumerate(counts)], device=device)
        yes_no = (model.lm_head or model.embed_tokens).weight[[3, 4]]
        direction = reference.yes_minus_no(yes_no, torch.promote_types(yes_no.dtype, torch.float32))[None]
        out = model.embed(batch, dim=40) if kind == "embedding" else model.scores(batch, direction)
        with capture(model, "layers.*.resid_mid", "final_norm") as acts, torch.no_grad():
            hooked = model.embed(batch, dim=40) if kind == "embedding" else model.scores(batch, direction)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found = [out, hooked, acts["final_norm"], acts["layers.3.resid_mid"], *grads]
        return [x.detach().double().cpu() for x in found]

    exact, plain = (run("reference", precision, "cpu") for precision in ("float64", dtype))
    found = run("triton", dtype, device)
    approximate = dtype == "float32" and request.node.callspec.params["device"] != "exact"
    for result in list(zip(found, plain, exact, strict=True))[: 4 if approximate else None]:
        obeys(*([x] for x in result))
    # Gradients together, each relative to its norm: the error of the worst conditioned, layer 2's k_norm, is 1e-6
    # and chance, in plain PyTorch as here: the worst is 0.9 to 2.0 times plain's in GPU arithmetic, with 12 seeds.
    error, of_plain = (
        sum(((g - x).norm() / x.norm()) ** 2 for g, x in zip(grads[4:], exact[4:], strict=True)) ** 0.5
        for grads in (found, plain)
    )
    assert error <= OPS_RATIO * of_plain, f"gradients: {error:.2e}, plain PyTorch {of_plain:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("device", MODES[:1], indirect=True)
@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_whole_model_with_more_tokens(kind, device, request):
    test_whole_model("float32", kind, (17, 1, 70), device, request)


@pytest.mark.parametrize("kind", ["embedding", slow("reranker")])
def test_parity_command(kind, device, request, capsys):
    pytest.importorskip("transformers")
    directory = request.getfixturevalue(f"{kind}_dir")
    texts = ["Gravity attracts.", "Paris shines"] if kind == "embedding" else ["<Query>: a\n<Document>: b", "x y"]
    options = ["--ops", "triton", "--dtype", "float32", "--inputs", *texts]
    assert main(["parity", str(directory), *options]) == 0
    out = capsys.readouterr().out
    assert out.count("| ok |") == 8
    assert "FAIL" not in out


def test_points_between_fused_operations_can_be_edited(embedding_dir, device):
    batch = pack([[1, 2, 3]], device=device)
    model = load_model(embedding_dir, dtype="float32", ops="triton", device=device)
    with torch.no_grad():
        before = model.embed(batch)
        with edit(model, {"layers.1.resid_mid": lambda x: x + 1}):
            changed = model.embed(batch)
    assert (changed - before).abs().max() > 1e-3


@pytest.mark.slow
def test_compiles_without_graph_breaks(embedding_dir, device):
    model = load_model(embedding_dir, dtype="float32", ops="triton", device=device)
    batch = pack([[1, 2, 3], [4]], device=device)
    compiled = torch.compile(model.embed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), model.embed(batch))


def test_replacing_a_part_drops_what_is_fused_with_it():
    ops = Ops.triton()
    mine = dataclasses.replace(ops, rms_norm=reference.rms_norm)
    assert (mine.add_rms_norm, mine.qk_norm_rope, mine.norm_pool, mine.norm_score) == (None, None, None, None)
    assert dataclasses.replace(ops, swiglu=reference.swiglu).qk_norm_rope is ops.qk_norm_rope
    other_rope = dataclasses.replace(ops, rope=lambda x, cos, sin: x)
    assert other_rope.qk_norm_rope is None
    assert other_rope.add_rms_norm is ops.add_rms_norm

    @declare(row_wise=True, parts={"rms_norm": reference.rms_norm, "rope": reference.rope})
    def mine_fused(*args):
        raise NotImplementedError

    both = dataclasses.replace(ops, rms_norm=reference.rms_norm, qk_norm_rope=mine_fused)
    assert both.qk_norm_rope is mine_fused  # given anew, in the same breath
    assert both.shortcuts
    with pytest.raises(InputError, match=r"ops: norm_pool: expected a function with reference.declare\(parts"):
        dataclasses.replace(ops, norm_pool=lambda *args: norm_pool(*args))
    mean = declare(parts={"rms_norm": ops.rms_norm, "pool": ops.pool})(lambda *args: norm_pool(*args, mean=True))
    assert not dataclasses.replace(ops, norm_pool=mean).shortcuts
    assert "norm_pool" in repr(ops)
    assert "norm_pool" not in repr(mine)


def wrong_attention(device):
    """Calls that attention must refuse, by what it must say."""
    q, kv, x = (torch.zeros(*s, device=device) for s in ((6, 4, 64), (6, 2, 64), (6, 64)))
    cu = cu_seqlens([6], device)

    def attend(q=q, k=kv, v=kv, cu_q=cu, cu_k=cu):
        return attention(q, k, v, cu_q, cu_k, 6, 6, debug=True)

    def cu_of(*counts):
        return cu_seqlens(counts, device)

    return {
        r"attention: v: expected \[Tk, Hkv, D\] with Tk = 6, Hkv = 2, D = 64, found \[5, 2, 64\]": lambda: attend(
            v=kv[1:]
        ),
        r"attention: q: expected \[Tq, Hq, D\] with .*, found \[6, 64\]": lambda: attend(q=x),
        r"attention: k: expected torch.float32, found torch.float16": lambda: attend(k=kv.half()),
        r"attention: q: expected float32, bfloat16 or float16, found torch.float64": lambda: attend(q=q.double()),
        r"attention: D: expected 64 or 128, found 32": lambda: attend(q[..., :32], kv[..., :32], kv[..., :32]),
        r"attention: Hq: expected 1, 2, 4, 8 or 16 times Hkv = 2, found 3": lambda: attend(q=q[:, :3]),
        r"attention: k: expected stride 1 along the last": lambda: attend(k=kv.mT.contiguous().mT),
        r"attention: cu_seqlens_q: expected \[N \+ 1\] int32, .* found \[2\] torch.int64": lambda: attend(
            cu_q=cu.long()
        ),
        r"attention: cu_seqlens_q: expected to go from 0 to 6": lambda: attend(cu_q=cu - 1),
        r"attention: cu_seqlens_k: expected to go from 0 to 6 .*, found \[0, 5\]": lambda: attend(cu_k=cu_of(5)),
        r"attention: cu_seqlens_q: expected to go .* steps of at least 0": lambda: attend(cu_q=cu_of(9, -3)),
        r"expected cu_seqlens_q and cu_seqlens_k of one length, found 3 and 2": lambda: attend(cu_q=cu_of(3, 3)),
        r"expected no more queries than keys, found 4 and 3": lambda: attend(cu_q=cu_of(4, 2), cu_k=cu_of(3, 3)),
    }


def wrong_others(device):
    """Calls that the other launchers must refuse, by what they must say."""
    q, kv, x, w = (torch.zeros(*s, device=device) for s in ((6, 4, 64), (6, 2, 64), (6, 64), (64,)))
    cu, cos = cu_seqlens([6], device), torch.zeros(6, 64, device=device)

    def rotate(q=q, kv=kv, w=w, cos=cos):
        return qk_norm_rope(q, kv, w, w, EPS, cos, cos)

    return {
        r"rms_norm: weight: expected \[H\] with H = 64, found \[63\]": lambda: rms_norm(x, w[1:], EPS),
        r"rms_norm: x: expected one to three dimensions": lambda: rms_norm(x[None, None], w, EPS),
        r"rms_norm: eps: expected more than 0, found 0": lambda: rms_norm(x, w, 0.0),
        r"rms_norm: residual: expected \[B, H\]": lambda: add_rms_norm(x, w, EPS, x[1:]),
        r"qk_norm_rope: cos: expected \[T, D\]": lambda: rotate(cos=cos[1:]),
        r"qk_norm_rope: cos, sin: expected constants": lambda: rotate(cos=cos.clone().requires_grad_()),
        r"qk_norm_rope: D: .* found 48": lambda: rotate(q[..., :48], kv[..., :48], w[:48], cos[:, :48]),
        r"swiglu: up: expected \[T, I\]": lambda: swiglu(x, x[:, 1:]),
        r"norm_pool: dim: expected 1 to 64, found 65": lambda: norm_pool(x, w, EPS, cu, 65, True),
        r"norm_pool: cu_.* at least 1": lambda: norm_pool(x, w, EPS, cu_seqlens([0, 6], device), 64, True, debug=True),
        r"norm_score: direction: expected \[64\] float32": lambda: norm_score(x, w, EPS, cu, w.half()),
    }


@pytest.mark.parametrize("wrong", [wrong_attention, wrong_others])
def test_bad_input_is_refused_with_its_name(wrong, device):
    for message, call in wrong(device).items():
        with pytest.raises(InputError, match=message):
            call()


def test_the_interpreter_alone_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "BFLOAT16_INTERPRETED", False)
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"expected float32 or float16, .*interpreter\.use_exact_arithmetic"):
        swiglu(x, x)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match=r"swiglu: expected tensors on a GPU \(or TRITON_INTERPRET=1 .*\), found cpu"):
        swiglu(torch.ones(2, 64), torch.ones(2, 64))
