"""Functions named on a command line, ``FILE.py:function``, and the operations that they stand for."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError
from .operations import OPERATIONS, Operation

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """A function to be looked at."""

    source: str
    """``FILE.py:function``"""
    op: str
    """A name in ``OPERATIONS``, or the function's where the file brings its own."""
    operation: Operation
    function: Callable[..., Any]
    config: Any = None
    """The entry of CONFIGS that is bound as ``config``; None: the function's default."""

    @property
    def name(self) -> str:
        """Source and configuration."""
        return self.source if self.config is None else f"{self.source} {self.config}"


def load(source: str, op: str | None = None, *, tune: bool = False) -> list[Variant]:
    """The function ``FILE.py:function``, once, or with ``tune`` once for each entry of the file's list CONFIGS.

    Its operation is ``op``; else the file's OPERATION; else the one of the function's name. Raises InputError.
    """
    path, _, name = source.rpartition(":")
    module = import_file(Path(path))
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{source}: expected a function {name!r} in {path}, found none")
    if op is None and isinstance(own := getattr(module, "OPERATION", None), Operation):
        op, operation = name, own
    else:
        op = op or name
        if op not in OPERATIONS:
            raise InputError(f"{source}: expected --op, one of {', '.join(OPERATIONS)}, or an OPERATION, found {op!r}")
        operation = OPERATIONS[op]
    if not tune:
        return [Variant(source, op, operation, function)]
    configs = getattr(module, "CONFIGS", None)
    if not isinstance(configs, list | tuple) or "config" not in inspect.signature(function).parameters:
        raise InputError(f"{source}: --tune: expected a list CONFIGS in {path}, and an argument config=, found none")
    return [Variant(source, op, operation, partial(function, config=config), config) for config in configs]


def import_file(path: Path) -> ModuleType:
    """A Python file as a module: a file of this package under its own name, any other under its path.

    Raises InputError.
    """
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"{path}: expected a Python file, found none")
    resolved = path.resolve()
    for folder in ("kernels", "weights", ""):
        if resolved.is_relative_to(base := (PACKAGE / folder).resolve()):
            parts = resolved.relative_to(base).with_suffix("").parts
            return importlib.import_module(".".join(filter(None, ("qwen3core", folder, *parts))))
    name = str(resolved)
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, resolved)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"{path}: expected a file to import, found {type(error).__name__}: {error}") from error
    return sys.modules[name]
