"""A model over several GPUs, by PyTorch's tensor parallelism: heads and MLP columns are shared out, the rest copied.

Started by ``torchrun --nproc-per-node 2 script.py``, every process runs the same calls on the same texts, and gets the
same results::

    mesh = init_device_mesh("cuda", (2,))
    embedder = Embedder.from_pretrained("Qwen/Qwen3-Embedding-8B", device="cpu", dtype="bfloat16", ops="triton")
    tensor_parallel(embedder.model, mesh)
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from . import reference
from .errors import InputError
from .model import MLP, Attention, Qwen3Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def tensor_parallel(model: Qwen3Model, mesh: "DeviceMesh") -> None:
    """Leave in each process of a mesh of one dimension, in place, its part of every layer's weights.

    Rows of q, k, v, gate and up are shared out (``ColwiseParallel``), and columns of o and down (``RowwiseParallel``),
    whose products all processes sum up: twice a layer (arXiv:1909.08053). Each process has some of the heads, which
    the shapes of its weights tell; points between these products have its part alone. Norms and embeddings are copied;
    the gradients of q_norm and k_norm are those of a process's heads, to be summed up. ``save`` cannot write it.

    The products become PyTorch's own, which know of parts: ``model.ops.linear`` is ``reference.linear``. Move a model
    to GPUs by this alone, since no GPU then holds more than its part.

    Raises:
        InputError: where the processes cannot share heads or MLP columns equally, for int8, and for layers or a product
            of one's own.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    _check(model, mesh.size())
    rows, columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    plan = {**dict.fromkeys(rows, ColwiseParallel()), **dict.fromkeys(columns, RowwiseParallel())}
    for layer in model.layers:
        for part in map(layer.get_submodule, ("self_attn", "mlp")):
            parallelize_module(part, mesh, {name: style for name, style in plan.items() if hasattr(part, name)})
    model.ops = replace(model.ops, linear=reference.linear, linears=None)
    model.to(mesh.device_type)


def _check(model: Qwen3Model, size: int) -> None:
    """Raise InputError for what ``size`` processes cannot share."""
    config = model.config
    for name in ("num_key_value_heads", "intermediate_size"):
        if (found := getattr(config, name)) % size:
            raise InputError(f"tensor_parallel: {name}: expected a multiple of {size}, the processes, found {found}")
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise InputError("tensor_parallel: expected weights in floating point, found int8")
    if not (model.ops.linear.__module__ or "").startswith(f"{__package__}."):
        raise InputError("tensor_parallel: ops: linear: expected one of this package, found another")
    for i, layer in enumerate(model.layers):
        own = (type(getattr(layer, "self_attn", None)), type(getattr(layer, "mlp", None)))
        if own != (Attention, MLP):
            raise InputError(f"tensor_parallel: layers.{i}: expected Attention and MLP of this package, found another")
