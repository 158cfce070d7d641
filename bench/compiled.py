"""Compile every kernel and configuration without a GPU: registers, spills, shared memory.

    python bench/compiled.py [--target sm_90 ...] [--kernel attention ...] [--defaults] [--json FILE]

What is compiled is what the launchers launch: they run on small CPU tensors with the sizes of the official models, in
bfloat16 and float32, while Triton is told that the target is there; each launch stops after compilation. A spill is
bytes of stack (NVIDIA) or registers (AMD); "tensor" counts instructions of tensor cores (HGMMA, UTCHMMA, HMMA, v_mfma),
of TMA (UTMALDG), and those that trade registers between warps (USETMAXREG).
"""

import argparse
import itertools
import json
import os
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime import driver

from qwen3core.batch import build_cu_seqlens
from qwen3core.config import OFFICIAL_SIZES
from qwen3core.kernels import attention, pooling, qk_norm_rope, rms_norm, swiglu
from qwen3core.kernels.gallery import (
    attention_hopper,
    cascade,
    fp8_norm,
    int8_norm,
    norm_linear,
    paged,
    sliding_window,
    swiglu_linear,
)
from qwen3core.laboratory.compiling import SHARED_MEMORY, TARGETS, Pretender, compiling, configuration, usage
from qwen3core.writing import writing

KERNELS = ("attention", "attention_hopper", "rms_norm", "qk_norm_rope", "swiglu", "pooling", "gallery")
MODELS = (("0.6B", torch.bfloat16), ("8B", torch.bfloat16), ("8B", torch.float32))
"""Official sizes, the smallest and the largest, and dtypes that kernels are compiled for."""


def launches(file, configs, *functions):
    """Cases of a file's functions in each configuration, the first of which is the default."""
    for config in configs:
        for function in functions:
            yield file, config == configs[0], partial(function, config=config)


def cases(target, size, dtype):
    """(kernel's file, default?, launch) of all that is to be compiled, defaults first."""
    driver.set_active(Pretender(target))
    model = OFFICIAL_SIZES[size]
    hq, hkv, D = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    q, k = (torch.empty(64, heads, D, dtype=dtype) for heads in (hq, hkv))
    x, gate = (torch.empty(64, n, dtype=dtype) for n in (model.hidden_size, model.intermediate_size))
    w, head_w, cos, lse = x[0], q[0, 0], q[:, 0].contiguous(), torch.empty(64, hq)
    cu = build_cu_seqlens([32, 32])
    saved, qk = (q, lse, q, k, k, q, lse, cu, cu), (q, k, head_w, head_w, 1e-6, cos, cos)
    family = attention._family(q)
    forward, dq, dkdv = (attention.CONFIGS[name][family] for name in ("forward", "dq", "dkdv"))
    yield from launches("attention", forward, partial(attention.attention, q, k, k, cu, cu, 32, 32))
    yield from launches("attention", dq, lambda config: attention.attention_backward(*saved, True, config, dkdv[0]))
    yield from launches("attention", dkdv, lambda config: attention.attention_backward(*saved, True, dq[0], config))
    yield "attention", True, partial(attention.attention, q, k, k, cu, cu, 32, 32, causal=False)
    yield "attention", True, partial(attention.attention_backward, *saved, False, [], [])
    if target == "sm_90" and dtype == torch.bfloat16:
        in_gluon = partial(attention_hopper.attention_hopper, q, k, k, cu, cu, 32, 32)
        yield from launches("attention_hopper", attention_hopper.CONFIGS, in_gluon, partial(in_gluon, causal=False))
    rows, added = partial(rms_norm.rms_norm, x, w, 1e-6), partial(rms_norm.add_rms_norm, x, w, 1e-6, x)
    yield from launches("rms_norm", rms_norm.CONFIGS, rows, added)
    norm_backward = partial(rms_norm.rms_norm_backward, x, x, x, w, 1e-6)
    yield "rms_norm", True, partial(rms_norm.rms_norm_backward, x, None, x, w, 1e-6, [])
    yield from launches("rms_norm", rms_norm.BACKWARD_CONFIGS, norm_backward)
    yield from launches("qk_norm_rope", qk_norm_rope.CONFIGS, partial(qk_norm_rope.qk_norm_rope, *qk))
    backward = partial(qk_norm_rope.qk_norm_rope_backward, q, k, *qk)
    yield from launches("qk_norm_rope", qk_norm_rope.BACKWARD_CONFIGS, backward)
    yield from launches("swiglu", swiglu.CONFIGS, partial(swiglu.swiglu, gate, gate))
    yield "swiglu", True, partial(swiglu.swiglu_backward, gate, gate, gate)
    last, mean = (partial(pooling.norm_pool, x, w, 1e-6, cu, 256, True, mean=mean) for mean in (False, True))
    score = partial(pooling.norm_score, x, w, 1e-6, cu, w.float())
    yield from launches("pooling", pooling.CONFIGS, last, score)
    yield from launches("pooling", pooling.MEAN_CONFIGS, mean)
    if dtype == torch.bfloat16 and target != "gfx942":  # where attention's tiles spill in paged.py and cascade.py
        yield from gallery_cases(q, k, x, gate, cu, fp8=target != "sm_80")


def gallery_cases(q, k, x, gate, cu, fp8):
    """The same for each file of kernels/gallery, in its default configuration."""
    pages, entries = k.unflatten(0, (-1, 16)), torch.zeros(2, 2, dtype=torch.int32)
    projection, inner = (torch.empty(n, x.shape[1], dtype=x.dtype) for n in (q.shape[1] * q.shape[2], gate.shape[1]))
    yield "gallery", True, partial(sliding_window.sliding_window, q, k, k, cu, cu, 32, 32, 512)
    yield "gallery", True, partial(cascade.cascade, q, k, k, k, k, cu, cu, 32, 32)
    yield "gallery", True, partial(paged.paged, q, pages, pages, entries, cu, cu)
    yield "gallery", True, partial(norm_linear.norm_linear, x, x[0], 1e-6, projection)
    yield "gallery", True, partial(swiglu_linear.swiglu_linear, x, inner, inner)
    yield "gallery", True, partial(int8_norm.int8_norm, x, x[0], 1e-6)
    if fp8:
        yield "gallery", True, partial(fp8_norm.fp8_norm, x, x[0], 1e-6)


def table(targets=tuple(TARGETS), kernels=KERNELS, defaults=False):
    """One row for each compiled kernel: default configurations for all of MODELS, others for the first."""
    seen = set()
    for target, (size, dtype) in itertools.product(targets, MODELS):
        every = not defaults and (size, dtype) == MODELS[0]
        for file, default, run in cases(target, size, dtype):
            compiled: list[Any] = []
            if file in kernels and (default or every):
                with compiling(target, compiled):
                    run()
            for kernel in (k for k in compiled if k.hash not in seen):
                seen.add(kernel.hash)
                row = {"target": target, "model": size, "dtype": str(dtype), "kernel": kernel.name, "default": default}
                row |= {"config": configuration(kernel), **usage(kernel)}
                yield row | {"shared": kernel.metadata.shared, "of": SHARED_MEMORY[target]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=tuple(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--defaults", action="store_true", help="no other than the default configurations")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    rows: list[dict] = []
    for row in table(args.target, args.kernel, args.defaults):
        if not rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
        rows.append(row)
    if args.json:
        with writing(args.json) as part:
            part.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
