"""Every error that qwen3core raises on purpose; each message names the thing, what was expected, what was found."""

import math
import re
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real

LONGEST_SPACE = 5_000_000
"""The tokenizers library's regex panics on a run of ten million white spaces."""


class Qwen3CoreError(ValueError):
    """Base of the family: catch this to catch all.

    Example:
        >>> try:
        ...     Embedder.from_pretrained("nowhere")
        ... except Qwen3CoreError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """


class CheckpointError(Qwen3CoreError):
    """A checkpoint (config, safetensors, tokenizer) that is missing, broken, or not what it says.

    Example:
        >>> Qwen3Config.from_dict({"model_type": "qwen3", "hidden_act": "gelu"})
        Traceback (most recent call last):
        qwen3core.errors.CheckpointError: config: hidden_act: expected 'silu', found 'gelu'
    """


class InputError(Qwen3CoreError):
    """A text, an option or a tensor that a call cannot take.

    Example:
        >>> pack([])
        Traceback (most recent call last):
        qwen3core.errors.InputError: pack: expected one or more sequences of at least one token, found lengths []
    """


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise InputError unless ``value`` is an integer (True is none) from ``low`` to ``high``."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else low - 1
    if number < low or (high is not None and number > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}: expected an integer {bounds}, found {value!r}")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raise InputError unless ``value`` is a finite number from ``low`` to ``high``; above: and not ``low`` itself."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (low <= number <= high) or math.isinf(number) or (above and number == low):
        bounds = f"{'above' if above else 'of at least'} {low:g}" + (
            f" and at most {high:g}" if high < math.inf else ""
        )
        raise InputError(f"{name}: expected a finite number {bounds}, found {value!r}")


def check_one_of(name: str, value: object, values: Iterable[object]) -> None:
    """Raise InputError unless ``value`` is one of these."""
    if value not in (values := list(values)):
        raise InputError(f"{name}: expected one of {', '.join(map(str, values))}, found {value!r}")


def check_text(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a str."""
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text (str), found {type(value).__name__}")


def as_text(name: str, value: object) -> str:
    """``value`` as a plain str: a subclass may add in ways of its own (markupsafe escapes). Raises InputError."""
    check_text(name, value)
    return str.__str__(value)


def check_unicode(name: str, text: str) -> None:
    """Raise InputError unless ``text`` is a str of Unicode text, which a lone surrogate is not."""
    check_text(name, text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: expected Unicode text, found a lone surrogate {text[error.start]!r} at character {error.start}"
        ) from None
    if len(text) > LONGEST_SPACE and any(len(run) > LONGEST_SPACE for run in re.findall(r"\s+", text)):
        raise InputError(f"{name}: expected at most {LONGEST_SPACE} white spaces in a row, found more")


def check_texts(texts: Iterable[str]) -> None:
    """Raise InputError, naming the index, for what is not Unicode text."""
    for index, text in enumerate(texts):
        check_unicode(f"input {index}", text)


def warn(message: str) -> None:
    """Warn at the line of the first caller outside this package, however deep the warning arises."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
