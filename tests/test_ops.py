"""Operations against the specification, and the specification against float64."""

import dataclasses

import pytest
import torch
from tolerances import OPS_RATIO

from qwen3core import InputError, Ops, load_model, ops_torch, pack, reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.ops import _confirmed, resolve
from qwen3core.ops_torch import LONG_KEYS
from qwen3core.products import PACKED

SETS = {name: resolve(name) for name in ("reference", "torch", "prepacked", "batch_invariant")}


def qkv(len_q, len_k, groups=2, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(sum(len_q), 2 * groups, 16, dtype=torch.float64)
    k, v = (torch.randn(sum(len_k), 2, 16, dtype=torch.float64) for _ in range(2))
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    return [*leaves, build_cu_seqlens(len_q), build_cu_seqlens(len_k), max(len_q), max(len_k)]


@pytest.mark.parametrize("ops", ["torch", "batch_invariant"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("len_q", "len_k"), [([1], [1]), ([65, 1, 3], [65, 1, 3]), ([1, 4, 64], [130, 4, 65]), ([9], [LONG_KEYS])]
)
@torch.no_grad()
def test_attention_is_as_exact_as_the_reference(len_q, len_k, groups, dtype, causal, ops):
    exact = reference.attention(*qkv(len_q, len_k, groups), causal=causal).double()
    both = (reference.attention, SETS[ops].attention)
    plain, ours = (attention(*qkv(len_q, len_k, groups, dtype), causal=causal) for attention in both)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= OPS_RATIO * (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (300, 1024), (40, 16, 128)], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_rms_norm_is_as_exact_as_the_reference(shape, dtype, gradients):
    """Rounded where the reference rounds: before the weight, which a single rounding at the end would not be."""
    torch.manual_seed(0)
    x, weight = torch.randn(*shape).mul(3).to(dtype), torch.rand(shape[-1]).add(0.5).to(dtype)
    before = x.clone()
    exact = reference.rms_norm(x.double(), weight.double(), 1e-6)
    plain = reference.rms_norm(x, weight, 1e-6)
    with torch.set_grad_enabled(gradients):
        ours = Ops.torch().rms_norm(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert torch.equal(x, before)
    assert (ours - exact).norm() <= OPS_RATIO * (plain - exact).norm()
    if not gradients and dtype != torch.float32:
        assert (ours != plain).float().mean() < 0.01  # but where a sum in another order crosses a rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 200])
@torch.no_grad()
def test_qk_norm_rope_is_its_parts(rows, dtype):
    """In bfloat16, rounded where they round; q and k are columns of one product."""
    q, k, _ = torch.randn(rows, 8 * 64).to(dtype).unflatten(1, (8, 64)).split((4, 2, 2), dim=1)
    weights = torch.rand(2, 64).to(dtype)
    cos, sin = torch.randn(2, rows, 64).to(dtype)
    found = ops_torch.qk_norm_rope(q, k, weights[0], weights[1], 1e-6, cos, sin)
    for x, y, weight in zip((q, k), found, weights, strict=True):
        expected = Ops.torch().rope(reference.rms_norm(x, weight, 1e-6), cos, sin)
        assert y.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(y, expected)
        else:
            assert (y != expected).float().mean() < 0.01


@pytest.mark.parametrize("ops", SETS)
def test_attention_is_aligned_at_the_bottom_right(ops):
    """Fewer queries than keys: the last queries of the whole, as for a pruned last layer or a shared prefix."""
    q, k, v, *_ = qkv([9, 5], [9, 5])
    whole = SETS[ops].attention(q, k, v, build_cu_seqlens([9, 5]), build_cu_seqlens([9, 5]), 9, 5)
    tail = torch.tensor([7, 8, 13])
    part = SETS[ops].attention(q[tail], k, v, build_cu_seqlens([2, 1]), build_cu_seqlens([9, 5]), 2, 9)
    torch.testing.assert_close(part, whole[tail])


@pytest.mark.parametrize("ops", SETS)
def test_attention_both_ways_sees_every_key(ops):
    """The mean of the values where all scores are equal; more queries than keys, too."""
    q, k, v, *rest = qkv([3, 1, 5], [2, 4, 5])
    found = SETS[ops].attention(0 * q, k, v, *rest, causal=False)
    means = torch.stack([part.mean(0) for part in v.split([2, 4, 5])]).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, means.repeat_interleave(torch.tensor([3, 1, 5]), dim=0))


@pytest.mark.parametrize("ops", SETS)
def test_attention_refuses_more_queries_than_keys(ops):
    with pytest.raises(InputError, match="expected no more queries than keys, found 3 and 2"):
        SETS[ops].attention(*qkv([3], [2]))


@pytest.mark.parametrize("ops", SETS)
def test_gradients_are_those_of_finite_differences(ops):
    chosen = SETS[ops]
    x, w = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True), torch.rand(8, dtype=torch.float64) + 0.5
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: chosen.rms_norm(x, w, 1e-6), (x, w))
    cos, sin = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: chosen.rope(q, cos, sin), (x,))
    assert torch.autograd.gradcheck(chosen.swiglu, (x, x.detach().flip(0).requires_grad_()))
    assert torch.autograd.gradcheck(lambda h: chosen.pool(h, build_cu_seqlens([2, 1]), 5, True), (x[:, 0],))
    args = qkv([2, 1], [3, 1])
    for causal in (True, False):
        assert torch.autograd.gradcheck(lambda *x, c=causal: chosen.attention(*x, *args[3:], causal=c), args[:3])


@pytest.mark.parametrize("ops", SETS)
def test_gradients_reach_every_parameter(embedding_dir, ops):
    model = load_model(embedding_dir, dtype="float32", ops=ops, device="cpu")
    batch = pack([[1, 2, 3], [4], [5, 6]])
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    (model.pool(model(batch), batch) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_replacing_one_op_swaps_it_everywhere(embedding_dir):
    model = load_model(embedding_dir, dtype="float32", device="cpu")
    seen = []

    def mine(x, weight, eps):
        seen.append(tuple(x.shape[1:]))
        return reference.rms_norm(x, weight, eps)

    before = model(pack([[1, 2, 3]]))
    model.ops = dataclasses.replace(model.ops, rms_norm=mine)
    after = model(pack([[1, 2, 3]]))
    torch.testing.assert_close(after, before)
    assert len(seen) == 4 * 4 + 1
    assert {(64,), (4, 128), (2, 128)} == set(seen)  # hidden states, q_norm, k_norm
    assert "mine" in repr(model.ops)
    assert "mine" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_prepacked_weights_follow_their_originals(dtype):
    """Used again, changed in place, asked for in another dtype, and freed with them."""
    x, weight = torch.randn(5, 64), torch.nn.Parameter(torch.randn(32, 64).to(dtype))
    linear, before = Ops.prepacked().linear, len(PACKED)
    plain = reference.linear(x, weight.float())
    for _ in range(2):
        torch.testing.assert_close(linear(x, weight), plain)
    assert len(PACKED) == before + 1
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight), 2 * plain)
    assert linear(x.bfloat16(), weight).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x, weight), 2 * plain)
    del weight
    assert len(PACKED) == before
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, torch.ones(3, 64)), x.sum(1, keepdim=True).expand(-1, 3))


@torch.no_grad()
def test_without_onednn(monkeypatch):
    """As torch is built for Apple's CPUs."""
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight = torch.randn(5, 64), torch.randn(32, 64)
    torch.testing.assert_close(Ops.torch().linear(x, weight), x @ weight.T)
    with pytest.raises(InputError, match="ops 'prepacked': expected a torch built with oneDNN"):
        Ops.prepacked()


def test_unknown_ops_set():
    names = "auto, reference, torch, prepacked, batch_invariant, triton"
    with pytest.raises(InputError, match=f"ops: expected one of {names}, or an Ops, found 'cuda'"):
        resolve("cuda")


def test_auto_is_confirmed_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    asked = []

    def confirm(ops, device):
        asked.append(device)
        return ops

    monkeypatch.setattr("qwen3core.kernels.confirm.confirm", confirm)
    _confirmed.cache_clear()
    for _ in range(2):
        assert resolve("auto", torch.device("cuda")) == Ops.triton()
    _confirmed.cache_clear()
    assert asked == [torch.device("cuda")]  # once
    assert resolve("triton", torch.device("cuda")).checked == ""
    assert resolve("auto", torch.device("cpu")) == resolve("auto") == Ops.torch()
    assert resolve("torch", torch.device("cuda")) == Ops.torch()


def test_pool_cuts_then_normalises():
    hidden = torch.tensor([[9.0, 9, 9], [3, 4, 12], [0, 5, 5]], dtype=torch.bfloat16)
    pooled = reference.pool(hidden, build_cu_seqlens([2, 1]), 2, True)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8], [0, 1]]))
    torch.testing.assert_close(reference.pool(hidden, build_cu_seqlens([2, 1]), 3, False), hidden[1:].float())
