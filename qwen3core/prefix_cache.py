"""An LRU cache of prefixes: keys and values of prompts and queries, from one call to the next."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain

from .batch import KeysValues, Prefix, pack
from .model import Qwen3Model


class PrefixCache:
    """LRU cache of the keys and values of prefixes, up to ``max_tokens`` tokens in all.

    An entry holds only for what made it: the ops, the compute dtype, and every weight of the model, replaced or changed
    in place; otherwise the cache is emptied. (A change through ``.data`` is not counted by torch, and not seen here.)
    Threads may share it; each sees whole entries. A copy, also in another process, begins empty.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._entries: dict[Prefix, KeysValues] = {}  # least recently used first
        self._made_by: _State | None = None

    def __len__(self) -> int:
        """The number of prefixes in it."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Prefix]:
        """The prefixes in it, the least recently used first."""
        return iter(tuple(self._entries))

    def __reduce__(self) -> tuple[type["PrefixCache"], tuple[int]]:
        return PrefixCache, (self.max_tokens,)

    def get(self, prefixes: Iterable[Prefix], model: Qwen3Model) -> dict[Prefix, KeysValues]:
        """Keys and values of as many of these prefixes, the first ones first, as fit in ``max_tokens``.

        Those that are missing are computed and replace the least recently used.
        """
        free, wanted = self.max_tokens, []
        for prefix in dict.fromkeys(prefixes):
            if 0 < len(prefix) <= free:
                free -= len(prefix)
                wanted.append(prefix)
        if not wanted and not self._entries:
            return {}
        state = _State(model)
        with self._lock:
            if self._made_by is None or not self._made_by.equals(state):
                self._entries.clear()
                self._made_by = state
            found = {prefix: self._entries[prefix] for prefix in wanted if prefix in self._entries}
        for prefix in wanted:  # outside the lock: other threads need not wait, at worst two compute the same
            if prefix not in found:
                found[prefix] = model.keys_values(pack([prefix], device=model.embed_tokens.weight.device))
        with self._lock:
            if self._made_by is not None and self._made_by.equals(state):
                for prefix in wanted:
                    self._entries.pop(prefix, None)
                    self._entries[prefix] = found[prefix]
                while sum(map(len, self._entries)) > self.max_tokens:
                    del self._entries[next(iter(self._entries))]
        return found


class _State:
    """What keys and values depend on, beside the prefix: two states are equal while none of it has changed."""

    def __init__(self, model: Qwen3Model) -> None:
        tensors = list(chain(model.parameters(), model.buffers()))
        self.settings = (model.ops, model.config, model.dtype)
        self.versions = [(id(x), None if x.is_inference() else x._version) for x in tensors]
        self.alive = [weakref.ref(x) for x in tensors]  # an id says nothing once its tensor is gone

    def equals(self, other: "_State") -> bool:
        if any(version is None for _, version in self.versions):  # torch counts no change of inference tensors
            return False
        same = self.settings == other.settings and self.versions == other.versions
        return same and all(tensor() is not None for tensor in self.alive)
