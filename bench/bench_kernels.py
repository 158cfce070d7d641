"""How fast is each kernel beside what torch ships, and beside its ceiling?

    python bench/bench_kernels.py [--kernel attention ...] [--model 0.6B 4B 8B] [--out FOLDER] [--tune] [--tiny]

bfloat16 on a GPU. Forward runs without autograd; backward is torch.autograd.grad of a graph built before, so that a
custom op's and a compiled graph's own overhead on the device counts. Each engine first computes the same random inputs
as the reference in float32, outputs and all gradients; one that disagrees gets no number. Attention counts 4 D Hq FLOPs
per visible pair, backward 2.5 times that; the other kernels count the bytes of their docstrings, whatever an engine
moves.

--tune times every entry of CONFIGS, the default first. --tiny is a smoke test of this script with
TRITON_INTERPRET=1, not of speed.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy
import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from qwen3core import Qwen3Config, profiling, reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.config import OFFICIAL_SIZES
from qwen3core.kernels import attention, pooling, qk_norm_rope, rms_norm, swiglu
from qwen3core.kernels.gallery import attention_hopper
from qwen3core.laboratory import contenders, timing
from qwen3core.ops import Ops

D, EPS, MEAN_LENGTH = 128, 1e-6, 300
TINY = replace(
    OFFICIAL_SIZES["0.6B"], num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96
)
TOLERANCE = 2e-2
"""Relative Frobenius error against float32: bfloat16 operands give 1e-3 to 1e-2."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# Interpreted kernels leave nothing to compile for: the smoke test spares the C++ compiler.
compiled = partial(torch.compile, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")

Prepare = Callable[[list[Tensor], list[Tensor]], Callable[[], Any]]
"""(inputs, gradients of the outputs), both the engine's own, to the call that is timed."""


@dataclass
class Case:
    """One row of the table for each engine; ``work`` is FLOPs or bytes."""

    labels: dict[str, str]
    engines: Mapping[str, Prepare]
    inputs: list[Tensor]
    douts: list[Tensor]
    expected: list[Tensor]
    work: float


def forward(function: Callable) -> Prepare:
    return lambda inputs, douts: partial(function, *inputs)


def backward(function: Callable) -> Prepare:
    def prepare(inputs, douts):
        leaves = [x.requires_grad_() for x in inputs]
        with torch.enable_grad():
            outs = listed(function(*leaves))
        douts = [dout.view(out.shape) for dout, out in zip(douts, outs, strict=True)]
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)

    return prepare


DIRECTIONS = {"forward": forward, "backward": backward}


def listed(outs: Any) -> list[Tensor]:
    return [outs] if isinstance(outs, Tensor) else list(outs)


def measure(case: Case, repeats: int) -> dict[str, timing.Timing]:
    """The engines that agree with the reference, timed; the others' errors."""
    results: dict[str, timing.Timing] = {name: {} for name in case.engines}  # in their order
    runs = {}
    for name, prepare in case.engines.items():
        try:
            # Copies: some engines write into what they get.
            inputs, douts = ([dynamic(x.clone()) for x in tensors] for tensors in (case.inputs, case.douts))
            run = prepare(inputs, douts)
            errors = [relative_error(*pair) for pair in zip(listed(run()), case.expected, strict=True)]
            worst = numpy.max(errors)  # NaN, if there is one
            if not worst < TOLERANCE:
                raise ValueError(f"disagrees with the reference, relative error {worst:.1e}")
            runs[name] = run
        except Exception as error:
            results[name] = timing.failure(error)
    return results | timing.compare(runs, DEVICE, repeats=repeats)


def relative_error(found: Tensor, expected: Tensor) -> float:
    if found.numel() > expected.numel():  # gradients of keys that were repeated for each query head
        found = found.float().unflatten(1, (expected.shape[1], -1)).sum(2)
    found = found.float().reshape(expected.shape)
    return float((found - expected).norm() / expected.norm())


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def dynamic(x: Tensor) -> Tensor:
    """x, for torch.compile of any number of rows: one compilation in place of one for each T."""
    if x.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def spread(tokens: int, mean: int) -> list[int]:
    """Lengths as texts have them, lognormal, in random order; they add up to ``tokens``."""
    draws = numpy.random.default_rng(0).lognormal(numpy.log(mean) - 0.8**2 / 2, 0.8, tokens)
    ends = numpy.minimum(numpy.cumsum(numpy.maximum(draws.astype(int), 1)), tokens)
    return [int(length) for length in numpy.diff(ends, prepend=0) if length]


# Attention


def attention_cases(direction: str, size: Qwen3Config, tiny: bool, tune: bool):
    hq, hkv = size.num_attention_heads, size.num_key_value_heads
    equal, totals, mean = ([(2, 16)], [40], 8) if tiny else (
        [(32, 512), (16, 1024), (4, 4096), (2, 8192), (1, 16384)], [16384, 65536], MEAN_LENGTH
    )  # fmt: skip
    batches = {f"{n} x {length}": [length] * n for n, length in equal}
    for total in totals:
        lengths = spread(total, mean)
        batches[f"spread {total}, sorted"] = sorted(lengths, reverse=True)
        batches[f"spread {total}, random"] = lengths
    for name, lengths in batches.items():
        torch.manual_seed(0)
        T, cu = sum(lengths), build_cu_seqlens(lengths).to(DEVICE)
        inputs, dout = [randn(T, hq, D), randn(T, hkv, D), randn(T, hkv, D)], randn(T, hq, D)
        expected = attention_expected(inputs, cu, dout, direction)
        work = 4 * D * hq * sum(n * (n + 1) // 2 for n in lengths) * (2.5 if direction == "backward" else 1)
        engines = (attention_configs if tune else attention_engines)(direction, inputs[0], cu, lengths)
        yield Case({"batch": name}, engines, inputs, [dout], expected, work)


def attention_expected(inputs: list[Tensor], cu: Tensor, dout: Tensor, direction: str) -> list[Tensor]:
    """The reference in float32, one key head at a time: all scores at once would not fit."""
    parts, differentiate = [], direction == "backward"
    key_heads = inputs[1].shape[1]
    for *head, dout_head in zip(*(x.float().chunk(key_heads, dim=1) for x in (*inputs, dout)), strict=True):
        q, k, v = leaves = [x.clone().requires_grad_(differentiate) for x in head]
        with torch.set_grad_enabled(differentiate):
            out = reference.attention(q, k, v, cu, cu, 0, 0)
        parts.append(torch.autograd.grad(out, leaves, dout_head) if differentiate else [out])
    return [torch.cat(heads, dim=1) for heads in zip(*parts, strict=True)]


def attention_engines(direction: str, q: Tensor, cu: Tensor, lengths: list[int]) -> dict[str, Prepare]:
    longest, prepared = max(lengths), DIRECTIONS[direction]

    def packed(function):
        return prepared(lambda q, k, v: function(q, k, v, cu, cu, longest, longest))

    engines = {name: packed(function) for name, function in contenders.OTHERS["attention"].items()}
    engines = {"ours": packed(attention.attention), **engines}
    engines["FlexAttention"] = flex(prepared, cu)
    if direction == "forward":
        engines["ours in Gluon"] = packed(attention_hopper.attention_hopper)
        engines["FlashInfer"] = partial(flashinfer, cu)
    if len(set(lengths)) == 1:
        engines["SDPA flash"] = sdpa(prepared, SDPBackend.FLASH_ATTENTION, longest)
        engines["SDPA cuDNN"] = sdpa(prepared, SDPBackend.CUDNN_ATTENTION, longest)
    return engines


def sdpa(prepared: Callable[[Callable], Prepare], backend: SDPBackend, length: int) -> Prepare:
    """One of SDPA's backends; it gets views, since they take packed strides as they are."""

    def function(q, k, v):
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def prepare(inputs, douts):
        try:
            run = prepared(function)(inputs, douts)
            run()
            return run
        except RuntimeError:  # no groups: keys and values for every query head, made here, outside the timed region
            q, k, v = (x.detach() for x in inputs)
            repeated = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (q, k, v)]
            return prepared(function)(repeated, douts)

    return prepare


def flex(prepared: Callable[[Callable], Prepare], cu: Tensor) -> Prepare:
    """One row of all tokens and a block mask of documents, also for equal lengths: one compilation for each T."""

    def prepare(inputs, douts):
        T = len(inputs[0])
        document = torch.bucketize(torch.arange(T, dtype=cu.dtype, device=DEVICE), cu, right=True)
        mask = flex_attention.create_block_mask(
            lambda b, h, i, j: (document[i] == document[j]) & (i >= j), None, None, T, T, device=DEVICE
        )
        run = compiled(flex_attention.flex_attention, dynamic=False)

        def function(*tensors):
            batched = [x.transpose(0, 1)[None] for x in tensors]
            return run(*batched, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return prepared(function)(inputs, douts)

    return prepare


def flashinfer(cu: Tensor, inputs: list[Tensor], douts: list[Tensor]) -> Callable[[], Any]:
    import flashinfer

    q, k, v = inputs
    workspace = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(cu, cu, q.shape[1], k.shape[1], D, causal=True, q_data_type=q.dtype)
    return partial(wrapper.run, q, k, v)


def attention_configs(direction: str, q: Tensor, cu: Tensor, lengths: list[int]) -> dict[str, Prepare]:
    """Ours with each configuration; of the two backward kernels one at a time, the other as it is by default."""
    family = attention._family(q)

    def backward_with(dq, dkdv, inputs, douts):
        q, k, v = inputs
        out, lse = attention.attention(q, k, v, cu, cu, 0, 0, return_lse=True)
        saved = (*douts, torch.zeros_like(lse), q, k, v, out, lse, cu, cu, True)
        return partial(attention.attention_backward, *saved, dq, dkdv)

    if direction == "forward":
        packed: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 0, "max_seqlen_k": 0}
        ours, in_gluon = attention.CONFIGS["forward"][family], attention_hopper.CONFIGS
        engines = {str(c): partial(attention.attention, **packed, config=c) for c in ours}
        engines |= {f"Gluon {c}": partial(attention_hopper.attention_hopper, **packed, config=c) for c in in_gluon}
        return {name: forward(function) for name, function in engines.items()}
    dq, dkdv = (attention.CONFIGS[kernel][family] for kernel in ("dq", "dkdv"))
    pairs = [(config, dkdv[0]) for config in dq] + [(dq[0], config) for config in dkdv[1:]]
    return {f"dq {a} dkdv {b}": partial(backward_with, a, b) for a, b in pairs}


# Kernels that memory decides


@dataclass
class Rows:
    """A memory-bound kernel on T rows: ours(*inputs, config=...), and formula(norm, *inputs) from the reference."""

    inputs: list[Tensor]
    ours: Callable
    formula: Callable
    bytes: dict[str, int]
    configs: tuple
    liger: Callable | None = None
    backward: Mapping[str, Prepare] = field(default_factory=dict)
    """Ours backward by configuration, where it has several."""


def rms_norm_rows(size: Qwen3Config, T: int, b: int) -> Rows:
    def formula(norm, x, w):
        return norm(x, w, EPS)

    def gradients(config, inputs, douts):
        return partial(rms_norm.rms_norm_backward, *douts, None, *inputs, EPS, config)

    H = size.hidden_size
    work = {"forward": 2 * T * H * b, "backward": 3 * T * H * b}
    ours = partial(rms_norm.rms_norm, eps=EPS)
    backward = {str(config): partial(gradients, config) for config in rms_norm.BACKWARD_CONFIGS}
    return Rows([randn(T, H), randn(H)], ours, formula, work, rms_norm.CONFIGS, liger_norm, backward)


def add_rms_norm_rows(size: Qwen3Config, T: int, b: int) -> Rows:
    def ours(x, w, residual, **options):
        return rms_norm.add_rms_norm(x, w, EPS, residual, **options)

    def formula(norm, x, w, residual):
        s = x + residual
        return norm(s, w, EPS), s

    def gradients(config, inputs, douts):
        x, w, residual = inputs
        run = partial(rms_norm.rms_norm_backward, *douts, x + residual, w, EPS, config)
        return lambda: [(grads := run())[0], grads[1], grads[0]]

    H = size.hidden_size
    work = {"forward": 4 * T * H * b, "backward": 4 * T * H * b}
    backward = {str(config): partial(gradients, config) for config in rms_norm.BACKWARD_CONFIGS}
    return Rows([randn(T, H), randn(H), randn(T, H)], ours, formula, work, rms_norm.CONFIGS, None, backward)


def qk_norm_rope_rows(size: Qwen3Config, T: int, b: int) -> Rows:
    def formula(norm, q, k, wq, wk):
        return tuple(reference.rope(norm(x, w, EPS), cos, sin) for x, w in ((q, wq), (k, wk)))

    def liger(q, k, wq, wk):
        from liger_kernel.ops.rope import LigerRopeFunction

        q, k = (liger_norm(x, w).transpose(0, 1)[None] for x, w in ((q, wq), (k, wk)))
        return [x[0].transpose(0, 1) for x in LigerRopeFunction.apply(q, k, cos[None], sin[None])]

    def gradients(config, inputs, douts):
        return partial(qk_norm_rope.qk_norm_rope_backward, *douts, *inputs, EPS, cos, sin, config)

    hq, hkv = size.num_attention_heads, size.num_key_value_heads
    angles = torch.rand(T, D // 2, device=DEVICE).mul(6.28).repeat(1, 2)
    cos, sin = (dynamic(x.to(DTYPE)) for x in (angles.cos(), angles.sin()))
    inputs = [randn(T, hq, D), randn(T, hkv, D), randn(D), randn(D)]
    ours = partial(qk_norm_rope.qk_norm_rope, eps=EPS, cos=cos, sin=sin)
    work = {direction: (n * (hq + hkv) + 2) * T * D * b for direction, n in (("forward", 2), ("backward", 3))}
    backward = {str(config): partial(gradients, config) for config in qk_norm_rope.BACKWARD_CONFIGS}
    return Rows(inputs, ours, formula, work, qk_norm_rope.CONFIGS, liger, backward)


def swiglu_rows(size: Qwen3Config, T: int, b: int) -> Rows:
    def formula(norm, gate, up):
        return reference.swiglu(gate, up)

    inner = size.intermediate_size
    work = {"forward": 3 * T * inner * b, "backward": 5 * T * inner * b}
    return Rows(
        [randn(T, inner), randn(T, inner)], swiglu.swiglu, formula, work, swiglu.CONFIGS, contenders.liger_swiglu
    )


def pooling_rows(kind: str, size: Qwen3Config, T: int, b: int) -> Rows:
    """Sequences of spread lengths. Backward by the least there is to move: dx written, the rows that count read.

    The torch engines, too, take the last rows before the norm.
    """
    H, lengths = size.hidden_size, spread(T, min(MEAN_LENGTH, T // 4))
    N, cu = len(lengths), build_cu_seqlens(lengths).to(DEVICE)
    last, ends = dynamic(cu[1:].long() - 1), torch.arange(N + 1, device=DEVICE)
    sequence, count = torch.arange(N, device=DEVICE).repeat_interleave(cu.diff()), cu.diff()[:, None]
    yes_no = torch.randn(2, H, device=DEVICE) / H**0.5

    def norm_pool(norm, x, w):
        return reference.pool(norm(x[last], w, EPS), ends, H, True)

    def norm_pool_mean(norm, x, w):
        total = torch.zeros(N, H, device=DEVICE).index_add(0, sequence, norm(x, w, EPS).float())
        return F.normalize(total / count, dim=-1)

    def norm_score(norm, x, w):
        return reference.p_yes(reference.pool(norm(x[last], w, EPS), ends, H, False), yes_no)

    pool = partial(pooling.norm_pool, eps=EPS, cu_seqlens=cu, dim=H, normalize=True)
    score = partial(pooling.norm_score, eps=EPS, cu_seqlens=cu, direction=reference.yes_minus_no(yes_no))
    ours, formula, read, written = {
        "norm_pool": (pool, norm_pool, N, 4 * N * H),
        "norm_pool_mean": (partial(pool, mean=True), norm_pool_mean, T, 4 * N * H),
        "norm_score": (score, norm_score, N, 4 * N),
    }[kind]
    work = {"forward": read * H * b + written, "backward": written + (read + T) * H * b}
    configs = pooling.MEAN_CONFIGS if kind == "norm_pool_mean" else pooling.CONFIGS
    return Rows([randn(T, H), randn(H)], ours, formula, work, configs)


liger_norm = partial(contenders.liger_rms_norm, eps=EPS)
POOLING = ("norm_pool", "norm_pool_mean", "norm_score")
ROWS: dict[str, Callable] = {
    "rms_norm": rms_norm_rows,
    "add_rms_norm": add_rms_norm_rows,
    "qk_norm_rope": qk_norm_rope_rows,
    "swiglu": swiglu_rows,
    **{kind: partial(pooling_rows, kind) for kind in POOLING},
}


def rows_cases(kernel: str, size: Qwen3Config, tiny: bool, tune: bool):
    for T in [24] if tiny else [1024, 16384, 65536]:
        torch.manual_seed(0)
        rows = ROWS[kernel](size, T, DTYPE.itemsize)
        douts, expected = rows_expected(rows, torch.float32 if kernel in POOLING else DTYPE)
        for direction, prepared in DIRECTIONS.items():
            if tune:
                engines = rows_configs(rows, direction)
            else:
                engines = {name: prepared(function) for name, function in row_functions(kernel, rows).items()}
            if not engines:  # a backward without configurations
                continue
            labels = {"direction": direction, "T": str(T)}
            yield Case(labels, engines, rows.inputs, douts, expected[direction], rows.bytes[direction])


def rows_expected(rows: Rows, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Random gradients of the outputs, in their dtype, and the reference's outputs and gradients in float32."""
    leaves = [x.clone().float().requires_grad_() for x in rows.inputs]
    with torch.enable_grad():
        outs = listed(rows.formula(reference.rms_norm, *leaves))
    douts = [torch.randn_like(out, dtype=dtype) for out in outs]
    gradients = torch.autograd.grad(outs, leaves, [dout.float() for dout in douts])
    return douts, {"forward": [out.detach() for out in outs], "backward": list(gradients)}


def rows_configs(rows: Rows, direction: str) -> Mapping[str, Prepare]:
    """Ours with each configuration."""
    if direction == "forward":
        return {str(config): forward(partial(rows.ours, config=config)) for config in rows.configs}
    return rows.backward


def row_functions(kernel: str, rows: Rows) -> dict[str, Callable]:
    formula = partial(rows.formula, reference.rms_norm)
    functions: dict[str, Callable] = {"ours": rows.ours, "torch eager": formula, "torch.compile": compiled(formula)}
    if kernel != "swiglu":
        functions["torch F.rms_norm"] = partial(rows.formula, Ops.torch().rms_norm)
    return functions | ({"Liger": rows.liger} if rows.liger else {})


# The run

KERNELS = {
    "attention": partial(attention_cases, "forward"),
    "attention_backward": partial(attention_cases, "backward"),
    **{kernel: partial(rows_cases, kernel) for kernel in ROWS},
}


def rows_of(kernel: str, model: str, case: Case, repeats: int, ceilings: dict[str, float]):
    unit, scale, ceiling = ("GB/s", 1e6, "copy_gbs") if kernel in ROWS else ("TFLOP/s", 1e9, "matmul_tflops")
    for engine, found in measure(case, repeats).items():
        row = {"kernel": kernel, "model": model, **case.labels, "engine": engine, **found}
        if "error" not in found:
            rate = case.work / found["p50"] / scale
            row |= {unit: rate, "share": rate / ceilings[ceiling]}
        yield row


def show(row: dict, first: bool) -> None:
    """One line of a Markdown table; numbers after the labels, or the error."""
    labels = {name: value for name, value in row.items() if isinstance(value, str) and name != "error"}
    numbers = [f"{value:.4g}" for value in row.values() if isinstance(value, float)] or [row["error"]]
    if first:
        unit = "GB/s" if row["kernel"] in ROWS else "TFLOP/s"
        columns = [*labels, "p25 ms", "p50 ms", "p75 ms", unit, "share"]
        print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    print("| " + " | ".join([*labels.values(), *numbers]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--model", nargs="+", choices=OFFICIAL_SIZES, default=["0.6B", "8B"])
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: bench/results; with --tiny: none")
    parser.add_argument("--tune", action="store_true", help="every configuration of ours in place of the contenders")
    parser.add_argument("--tiny", action="store_true", help="minute sizes: a smoke test, also without a GPU")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.tiny:
        parser.error("expected a GPU; without one --tiny, with TRITON_INTERPRET=1 in the environment")
    sizes = {"tiny": TINY} if args.tiny else {model: OFFICIAL_SIZES[model] for model in args.model}
    folder = args.out or (None if args.tiny else harness.RESULTS)
    torch._functorch.config.donated_buffer = False  # a compiled graph's backward is run many times
    environment, ceilings = harness.environment(DEVICE), vars(profiling.ceilings(DEVICE, DTYPE))
    print(environment, ceilings)
    for kernel in args.kernel:
        found: list[dict] = []
        for model, size in sizes.items():
            torch.compiler.reset()  # or the next model's sizes would be compiled as dynamic
            for case in KERNELS[kernel](size, args.tiny, args.tune):
                rows = list(rows_of(kernel, model, case, 2 if args.tiny else 20, ceilings))
                for row in rows:
                    show(row, first=not found)
                    found.append(row)
                timed = [row for row in rows if "share" in row]
                if args.tune and timed:
                    print(f"best: {max(timed, key=lambda row: row['share'])['engine']}")
                if folder:  # after every case: a run cut short keeps what it has measured
                    harness.save(folder, f"{kernel}_tune" if args.tune else kernel, found, environment, ceilings)


if __name__ == "__main__":
    with torch.no_grad():
        main()
