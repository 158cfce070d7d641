"""How fast is each kernel beside what torch ships, and beside its ceiling?

    python bench/bench_kernels.py [--kernel attention ...] [--model 0.6B 4B 8B] [--out FOLDER] [--tune] [--tiny]

bfloat16 on a GPU. Forward runs without autograd; backward is torch.autograd.grad of a graph built before, so that a
custom op's and a compiled graph's own overhead on the device counts. Each engine first computes the same random inputs
as the specification in float32, outputs and all gradients; one that disagrees gets no number. Operations, their least
work and the contenders are the laboratory's. Attention counts FLOPs, backward 2.5 times as many; the other kernels
count bytes, backward those of the forward and of the gradients, whatever an engine moves.

--tune times every entry of CONFIGS, the default first. --tiny is a smoke test of this script with
TRITON_INTERPRET=1, not of speed.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3core import Qwen3Config, profiling, reference
from qwen3core.config import OFFICIAL_SIZES
from qwen3core.kernels import attention, pooling, qk_norm_rope, rms_norm, swiglu
from qwen3core.kernels.gallery import attention_hopper
from qwen3core.laboratory import timing
from qwen3core.laboratory.contenders import contenders
from qwen3core.laboratory.operations import (
    OPERATIONS,
    Operation,
    attention_arguments,
    cast,
    norm_pool_arguments,
    norm_score_arguments,
)
from qwen3core.ops import Ops

MEAN_LENGTH = 300
TINY = replace(
    OFFICIAL_SIZES["0.6B"], num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FORWARD_ONLY = ("ours in Gluon", "FlashInfer")

Engines = Mapping[str, Callable[[], timing.Run]]


@dataclass
class Case:
    """One row of the table for each engine; ``work`` is FLOPs or bytes."""

    labels: dict[str, str]
    engines: Engines
    expected: list[Tensor]
    work: float


def random_arguments(make: Callable[..., tuple], *sizes: Any) -> tuple[list[Any], list[Any]]:
    """Arguments of an operation on the device: in DTYPE, and the same numbers in float32."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = make(*sizes)
    return cast(made, DTYPE, device=DEVICE), cast(made, DTYPE, torch.float32, device=DEVICE)


def spread(tokens: int, mean: int) -> list[int]:
    """Lengths as texts have them, lognormal, in random order; they add up to ``tokens``."""
    draws = numpy.random.default_rng(0).lognormal(numpy.log(mean) - 0.8**2 / 2, 0.8, tokens)
    ends = numpy.minimum(numpy.cumsum(numpy.maximum(draws.astype(int), 1)), tokens)
    return [int(length) for length in numpy.diff(ends, prepend=0) if length]


def others(kernel: str, operation: Operation) -> dict[str, Callable[..., Any]]:
    """The contenders of an operation, without this project's own sets."""
    return {name: f for name, f in contenders(kernel, operation).items() if not name.startswith("ops ")}


def with_configs(prepare: Callable[[], timing.Run], owner: Any, configs: Mapping[str, Any]) -> Callable[[], timing.Run]:
    """What runs while some of a module's lists of configurations have one entry, which is the default then."""

    def prepared() -> timing.Run:
        run = prepare()

        def configured() -> Any:
            with mock.patch.multiple(owner, **configs):
                return run()

        return configured

    return prepared


# Attention


def attention_cases(direction: str, size: Qwen3Config, tiny: bool, tune: bool) -> Iterator[Case]:
    heads = (size.num_attention_heads, size.num_key_value_heads, size.head_dim)
    equal, totals, mean = ([(2, 16)], [40], 8) if tiny else (
        [(32, 512), (16, 1024), (4, 4096), (2, 8192), (1, 16384)], [16384, 65536], MEAN_LENGTH
    )  # fmt: skip
    batches = {f"{n} x {length}": [length] * n for n, length in equal}
    for total in totals:
        lengths = spread(total, mean)
        batches[f"spread {total}, sorted"] = sorted(lengths, reverse=True)
        batches[f"spread {total}, random"] = lengths
    for name, lengths in batches.items():
        arguments, wide = random_arguments(attention_arguments, *heads, lengths, lengths)
        dout = torch.randn_like(arguments[0])
        expected = attention_expected(wide, dout, direction)
        work = OPERATIONS["attention"].work(*arguments)[1] * (2.5 if direction == "backward" else 1)
        make = attention_configs if tune else attention_engines
        yield Case({"batch": name}, make(direction, arguments, [dout], lengths), expected, work)


def attention_expected(wide: list[Any], dout: Tensor, direction: str) -> list[Tensor]:
    """The specification in float32, one key head at a time: all scores at once would not fit."""
    parts = []
    for *head, dout_head in zip(*(x.chunk(wide[1].shape[1], dim=1) for x in (*wide[:3], dout.float())), strict=True):
        given = [dout_head] if direction == "backward" else []
        leaves = [x.detach().requires_grad_() for x in head]
        parts.append(timing.listed(timing.prepared(reference.attention, [*leaves, *wide[3:]], given)()))
    return [torch.cat(heads, dim=1) for heads in zip(*parts, strict=True)]


def attention_engines(direction: str, arguments: list[Any], douts: list[Tensor], lengths: list[int]) -> Engines:
    functions = {"ours": attention.attention, **others("attention", OPERATIONS["attention"])}
    functions["ours in Gluon"] = attention_hopper.attention_hopper
    several = len(set(lengths)) > 1
    for name in list(functions):
        too_large = name in ("torch eager", "torch.compile")  # all scores of a sequence at once
        if too_large or (name in FORWARD_ONLY and direction == "backward") or (several and name.startswith("SDPA")):
            del functions[name]
    return timing.engines_of(functions, arguments, douts, direction)


def attention_configs(direction: str, arguments: list[Any], douts: list[Tensor], lengths: list[int]) -> Engines:
    """Ours with each configuration; of the two backward kernels one at a time, the other as it is by default."""
    family, ours = attention._family(arguments[0]), attention.attention
    forward, dq, dkdv = (attention.CONFIGS[kernel][family] for kernel in ("forward", "dq", "dkdv"))
    if direction == "forward":
        functions = {str(c): partial(ours, config=c) for c in forward}
        in_gluon = attention_hopper.attention_hopper
        functions |= {f"Gluon {c}": partial(in_gluon, config=c) for c in attention_hopper.CONFIGS}
        return timing.engines_of(functions, arguments, douts, direction)
    prepare = partial(timing.prepared, ours, arguments, douts)
    pairs = [(config, dkdv[0]) for config in dq] + [(dq[0], config) for config in dkdv[1:]]
    return {
        f"dq {a} dkdv {b}": with_configs(
            prepare, attention, {"CONFIGS": attention.CONFIGS | {"dq": {family: (a,)}, "dkdv": {family: (b,)}}}
        )
        for a, b in pairs
    }


# Kernels that memory decides


def mean_formula(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def norm_pool_mean(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool) -> Tensor:
        lengths = cu_seqlens.diff()
        sequence = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths, output_size=len(x))
        total = torch.zeros(len(lengths), dim, device=x.device).index_add(0, sequence, norm(x, weight, eps).float())
        return F.normalize(total / lengths[:, None], dim=-1)

    return norm_pool_mean


def mean_work(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool) -> tuple[int, int]:
    return x.nbytes + weight.nbytes + 4 * (len(cu_seqlens) - 1) * dim, 6 * x.numel()


def pooled(make: Callable[..., tuple], size: Qwen3Config, T: int, *rest: Any) -> tuple:
    """Arguments of sequences of spread lengths."""
    return make(spread(T, min(MEAN_LENGTH, T // 4)), size.hidden_size, *rest)


def pooled_whole(size: Qwen3Config, T: int) -> tuple:
    return pooled(norm_pool_arguments, size, T, size.hidden_size, True)


MODULES = {
    **{"rms_norm": rms_norm, "add_rms_norm": rms_norm, "qk_norm_rope": qk_norm_rope, "swiglu": swiglu},
    **{"norm_pool": pooling, "norm_pool_mean": pooling, "norm_score": pooling},
}
ROWS = {name: OPERATIONS[name] for name in ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")}
ROWS["norm_pool"] = replace(OPERATIONS["norm_pool"], large=pooled_whole)
ROWS["norm_pool_mean"] = replace(ROWS["norm_pool"], specification=mean_formula(reference.rms_norm), work=mean_work)
ROWS["norm_score"] = replace(OPERATIONS["norm_score"], large=partial(pooled, norm_score_arguments))


def rows_cases(kernel: str, size: Qwen3Config, tiny: bool, tune: bool) -> Iterator[Case]:
    operation = ROWS[kernel]
    for T in [24] if tiny else [1024, 16384, 65536]:
        arguments, wide = random_arguments(operation.large, size, T)
        douts, expected = timing.expect(operation.specification, arguments, wide)
        moved = operation.work(*arguments)[0]
        gradients = sum(x.nbytes for x in arguments if isinstance(x, Tensor) and x.requires_grad)
        if kernel == "add_rms_norm":  # in place of x and residual their sum is read, and their gradient is one
            gradients = 0
        work = {"forward": moved, "backward": moved + gradients}
        for direction, results in expected.items():
            engines = (rows_configs if tune else rows_engines)(kernel, direction, arguments, douts)
            if engines:  # a backward may have no configurations
                yield Case({"direction": direction, "T": str(T)}, engines, results, work[direction])


def ours_of(kernel: str) -> Callable[..., Any]:
    mean = kernel == "norm_pool_mean"
    return partial(pooling.norm_pool, mean=True) if mean else getattr(MODULES[kernel], kernel)


def rows_engines(kernel: str, direction: str, arguments: list[Any], douts: list[Tensor]) -> Engines:
    functions = {"ours": ours_of(kernel), **others(kernel, ROWS[kernel])}
    if kernel == "norm_pool_mean":
        functions["torch F.rms_norm"] = mean_formula(Ops.torch().rms_norm)
    return timing.engines_of(functions, arguments, douts, direction)


def rows_configs(kernel: str, direction: str, arguments: list[Any], douts: list[Tensor]) -> Engines:
    """Ours with each configuration."""
    ours, module = ours_of(kernel), MODULES[kernel]
    if direction == "forward":
        configs = pooling.MEAN_CONFIGS if kernel == "norm_pool_mean" else module.CONFIGS
        functions = {str(config): partial(ours, config=config) for config in configs}
        return timing.engines_of(functions, arguments, douts, direction)
    prepare = partial(timing.prepared, ours, arguments, douts)
    configs = getattr(module, "BACKWARD_CONFIGS", ())
    return {str(config): with_configs(prepare, module, {"BACKWARD_CONFIGS": (config,)}) for config in configs}


# The run

KERNELS = {
    "attention": partial(attention_cases, "forward"),
    "attention_backward": partial(attention_cases, "backward"),
    **{kernel: partial(rows_cases, kernel) for kernel in ROWS},
}


def rows_of(kernel: str, model: str, case: Case, repeats: int, ceilings: dict[str, float]):
    unit, scale, ceiling = ("GB/s", 1e6, "copy_gbs") if kernel in ROWS else ("TFLOP/s", 1e9, "matmul_tflops")
    for engine, found in timing.measure(case.engines, case.expected, DEVICE, repeats).items():
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
