"""Checkpoints for other runtimes: ONNX, OpenVINO's IR and GGUF, each whole or not at all.

``FORMATS[name].write(source, output, dtype)`` writes an open ``Source``; a format's packages are imported by that call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import check_one_of
from . import gguf, onnx, openvino
from .source import open_source


@dataclass(frozen=True)
class Format:
    """What a checkpoint can be exported to."""

    write: Callable[..., None]
    """(source, output, dtype) to a folder, or to a file."""
    packages: tuple[str, ...]
    """What it imports, by the names that pip knows."""
    dtypes: tuple[str, ...]
    """What matrices may be stored in."""


FORMATS = {
    "onnx": Format(onnx.write, ("onnx-ir", "onnxruntime"), tuple(onnx.FILES)),
    "openvino": Format(openvino.write, ("onnx-ir", "openvino"), openvino.DTYPES),
    "gguf": Format(gguf.write, ("gguf",), tuple(gguf.TYPES)),
}
"""By name, what can be written, and what for that must be installed."""


def export(
    path_or_id: str | Path,
    output: str | Path,
    *,
    format: str,
    dtype: str = "float32",
    job: str | None = None,
    revision: str | None = None,
) -> None:
    """Write a checkpoint in another format.

    Args:
        path_or_id, job, revision: as for ``from_pretrained``.
        output: a new directory; of GGUF, a file.
        format: ``"onnx"``, ``"openvino"`` or ``"gguf"``; what each writes is in the file of its name.
        dtype: what matrices are stored in: ``"float32"``, ``"float16"`` (which the usual bfloat16 weights fit exactly),
            ``"int8"`` (not OpenVINO), ``"bfloat16"`` (GGUF). Graphs compute in float32, but for int8's products.

    Raises:
        InputError: for the options, and for what the format cannot hold.
        CheckpointError, OSError: where files cannot be read, or written.

    Example:
        >>> with TemporaryDirectory() as folder:
        ...     export("tiny-embedding", f"{folder}/tiny.gguf", format="gguf", dtype="float16")
    """
    check_one_of("format", format, FORMATS)
    check_one_of("dtype", dtype, FORMATS[format].dtypes)
    FORMATS[format].write(open_source(path_or_id, Path(output), job=job, revision=revision), Path(output), dtype)
