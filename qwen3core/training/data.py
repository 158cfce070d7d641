"""Training data: JSONL files, as the guides to training this model series have them.

    {"query": "...", "response": "...", "rejected_response": ["...", ...]}
    {"messages": [{"role": "user", "content": "..."}],
     "positive_messages": [[{"role": "user", "content": "..."}]], "negative_messages": [[...], ...]}

``rejected_response`` may be one text, or missing; a system message among ``messages`` is the query's instruction. A row
of several positives is an example of each. A row whose negative is one of its positives is broken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..reading import read_jsonl

SHOWN = 10
"""Broken rows that an error names."""


@dataclass(frozen=True)
class Example:
    """A query with a text that answers it and texts that do not."""

    query: str
    """The query, without its instruction."""
    positive: str
    """A text that answers it."""
    negatives: tuple[str, ...] = ()
    """Texts that do not."""
    instruction: str | None = None
    """The task, if the query has one of its own."""


def read_examples(paths: Sequence[str | Path]) -> list[Example]:
    """All examples of the files, in order. Raises InputError that names file, line and reason of the broken rows."""
    examples: list[Example] = []
    broken: list[str] = []
    for path in paths:
        for row, where in read_jsonl(path, broken):
            try:
                examples += _examples(row)
            except InputError as error:
                broken.append(f"{where}: {error}")
    if broken:
        more = f"\n... and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise InputError(f"{len(broken)} broken rows:\n" + "\n".join(broken[:SHOWN]) + more)
    if not examples:
        raise InputError(f"{', '.join(map(str, paths))}: expected rows with query and response, found none")
    return examples


def _examples(row: Any) -> list[Example]:
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {str(row)[:80]}")
    if "messages" in row:
        system, query = _messages(row["messages"], "messages")
        positives, negatives = (
            [_messages(m, name)[1] for m in _list(row.get(name, []), name)]
            for name in ("positive_messages", "negative_messages")
        )
        if not positives:
            raise InputError("positive_messages: expected one or more, found none")
    else:
        system, query = None, _filled(row.get("query"), "query")
        positives = [_filled(row.get("response"), "response")]
        rejected = row.get("rejected_response") or []
        rejected = [rejected] if isinstance(rejected, str) else _list(rejected, "rejected_response")
        negatives = [_filled(text, "rejected_response") for text in rejected]
    if both := set(positives).intersection(negatives):
        raise InputError(f"expected negatives that are no positives, found {both.pop()!r:.80} as both")
    return [Example(query, positive, tuple(negatives), system) for positive in positives]


def _messages(messages: Any, name: str) -> tuple[str | None, str]:
    """The system message's text, if there is one, and the other message's."""
    found: dict[bool, str] = {}
    for message in _list(messages, name):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise InputError(
                f"{name}: expected messages with a role (system, user or assistant), found {message!r:.80}"
            )
        if message["role"] != "system" and False in found:
            raise InputError(f"{name}: expected one message beside the system's, found more")
        found[message["role"] == "system"] = _filled(message.get("content"), f"{name}: content")
    if False not in found:
        raise InputError(f"{name}: expected a message of the user, found none")
    return found.get(True), found[False]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name}: expected a list, found {value!r:.80}")
    return value


def _filled(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name}: expected a text, found {value!r:.80}")
    return value
