"""OpenVINO's IR: ``openvino/openvino_model.xml`` in a folder like the checkpoint's, of any batch and length.

OpenVINO opens the file, sentence-transformers (``backend="openvino"``) the folder. Inputs and outputs: as of ONNX.
"""

import tempfile
from pathlib import Path

from ..writing import writing_into
from .graph import build
from .onnx import save
from .source import HELD_BY_GRAPHS, Source, check_held, copy_surroundings, describe

DTYPES = ("float32", "float16")
"""What matrices may be stored in."""


def write(source: Source, output: Path, dtype: str) -> None:
    """Write the folder. Raises InputError for what the graph cannot hold, and OSError."""
    check_held(source, "openvino", HELD_BY_GRAPHS)
    import openvino

    graph = build(source, half=dtype == "float16")
    with writing_into(output) as part:
        (part / "openvino").mkdir()
        with tempfile.TemporaryDirectory(dir=part) as folder:
            save(graph, Path(folder) / "model.onnx", {})
            model = openvino.Core().read_model(Path(folder) / "model.onnx")
            for name, value in describe(source).items():
                model.set_rt_info(value, name.split("."))
            openvino.save_model(model, part / "openvino" / "openvino_model.xml", compress_to_fp16=False)
            del model  # which holds the file in that folder
        copy_surroundings(source, part, {})
