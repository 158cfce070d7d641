"""ONNX: ``onnx/model.onnx`` in a folder like the checkpoint's, of any batch and length.

ONNX Runtime opens the file; sentence-transformers (``backend="onnx"``) and transformers.js open the folder. Inputs are
``input_ids`` and ``attention_mask`` [B, L] int64, padded on either end; for outputs see ``graph.build``.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from ..writing import writing_into
from .graph import build
from .source import HELD_BY_GRAPHS, Source, check_held, copy_surroundings, describe

FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_int8.onnx"}
"""Names by which transformers.js finds a dtype."""
FILE_LIMIT = 1_900_000_000
"""Bytes of weights in one file; protobuf ends at 2 GiB."""


def write(source: Source, output: Path, dtype: str) -> None:
    """Write the folder; of int8, the matrices' columns and every activation have a scale each, by ONNX Runtime.

    Of int8, embeddings are float16. Raises InputError for what the graph cannot hold, and OSError.
    """
    check_held(source, "onnx", HELD_BY_GRAPHS)
    model = build(source, half=dtype == "float16", embeddings_half=dtype == "int8")
    with writing_into(output) as part:
        (part / "onnx").mkdir()
        path = part / "onnx" / FILES[dtype]
        with tempfile.TemporaryDirectory(dir=part) as folder:
            outside = save(_quantised(model, Path(folder)) if dtype == "int8" else model, path, describe(source))
        config = {"transformers.js_config": {"use_external_data_format": True}} if outside else {}
        copy_surroundings(source, part, config)


def _quantised(model: Any, folder: Path) -> Any:
    """The graph with MatMul in int8, whose weights lie in ``folder``."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    wide, narrow = folder / "wide.onnx", folder / "narrow.onnx"
    onnx_ir.save(model, wide, external_data="wide.data")
    logging.disable(logging.WARNING)  # which would have the graph optimised first
    try:
        # Of 7 bits, since sums of products of 8 overflow on x86 without VNNI: 1 - cosine was then 7e-3, not 1e-3.
        quantize_dynamic(
            wide,
            narrow,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnx_ir.load(narrow)


def save(model: Any, path: Path, metadata: dict[str, str]) -> bool:
    """Write the graph, and weights of more than ``FILE_LIMIT`` bytes to a file beside it; whether there is one."""
    import onnx_ir

    model.metadata_props.update(metadata)
    outside = sum(x.const_value.nbytes for x in model.graph.initializers.values()) > FILE_LIMIT
    if not outside:
        onnx_ir.external_data.load_to_model(model)
    onnx_ir.save(model, path, external_data=f"{path.name}_data" if outside else None)
    return outside
