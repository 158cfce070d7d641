"""Text to token ids by the checkpoints' conventions: only content is ever truncated, never EOS, never a template."""

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from . import prompts
from .errors import CheckpointError, InputError, check_text, warn

LONGEST_SPACE = 5_000_000
"""The tokenizers library's regex panics on a run of ten million white spaces."""


class Tokenizer:
    """A checkpoint's tokenizer.json.

    Its post-processor, truncation and padding are not used: whether or not it appends ``<|endoftext|>``, this class
    does so exactly once for embedding and never for reranking.

    Text that spells a special token (``<|im_end|>``) becomes that token, as in transformers; ``split_special_tokens``
    makes it plain text instead, for texts that are not trusted. As there, tokens that tokenizer.json does not mark
    as special (``<think>``, ``<tool_call>``) are still recognised; they cannot end a turn.
    """

    def __init__(self, path: str | Path, *, split_special_tokens: bool = False) -> None:
        """Read a tokenizer.json. Raises CheckpointError where it is missing, broken, or has no ``<|endoftext|>``."""
        self.path = Path(path)
        if not self.path.is_file():
            found = "a directory" if self.path.is_dir() else "nothing"
            raise CheckpointError(f"{self.path}: expected a tokenizer file, found {found}")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{self.path}: expected a tokenizer, found something else ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.backend.encode_special_tokens = False
        self.eos = self._single(prompts.EOS)
        self.prefix, self.suffix = self.encode([prompts.RERANKER_PREFIX, prompts.RERANKER_SUFFIX])
        # Once and for all, after the templates: threads share the backend.
        self.backend.encode_special_tokens = split_special_tokens

    def check(self, texts: Sequence[str]) -> None:
        """Raise InputError, naming the index, for what is not Unicode text."""
        for index, text in enumerate(texts):
            check_text(f"input {index}", text)
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"input {index}: expected Unicode text, found a lone surrogate {text[error.start]!r} "
                    f"at character {error.start}"
                ) from None
            if len(text) > LONGEST_SPACE and any(len(run) > LONGEST_SPACE for run in re.findall(r"\s+", text)):
                raise InputError(f"input {index}: expected at most {LONGEST_SPACE} white spaces in a row, found more")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of checked texts alone."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def content(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts alone. Raises InputError, naming the index, for what is not Unicode text."""
        self.check(texts)
        return self.encode(texts)

    def embedding(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text, then EOS; at most ``max_length`` each, with one warning for all that were truncated."""
        return self.close(self.content(texts), max_length)

    def close(self, contents: list[list[int]], max_length: int) -> list[list[int]]:
        """``embedding`` of texts whose ids are given."""
        return self._truncate(contents, [], [self.eos], max_length)

    def reranking(self, bodies: Sequence[str], max_length: int) -> list[list[int]]:
        """Prefix, body, suffix, joined as ids; the body alone is truncated. Warns where a body holds special tokens."""
        return self.frame(self.content(bodies), max_length)

    def frame(self, contents: list[list[int]], max_length: int) -> list[list[int]]:
        """``reranking`` of bodies whose ids are given."""
        special = sum(not self.special_ids.isdisjoint(ids) for ids in contents)
        if special:
            warn(
                f"{special} of {len(contents)} inputs contain special tokens such as <|im_end|>, which can close the "
                "template early; pass split_special_tokens=True to from_pretrained to read them as plain text"
            )
        return self._truncate(contents, self.prefix, self.suffix, max_length)

    def yes_no(self) -> tuple[int, int]:
        """Ids of the two answers. Raises CheckpointError where one is not a single token."""
        return self._single(prompts.YES), self._single(prompts.NO)

    def check_vocabulary(self, rows: int) -> None:
        """Raise CheckpointError unless this vocabulary fits an embedding matrix of ``rows``.

        Matrices may be padded (151,936 rows for 151,669 tokens), and official ones may lack the last few added
        tokens, so the base vocabulary and EOS must fit, and no more than 1,024 rows may stay unused.
        """
        base, total = self.backend.get_vocab_size(with_added_tokens=False), self.backend.get_vocab_size()
        if not max(base, self.eos + 1) <= rows <= total + 1024:
            raise CheckpointError(
                f"{self.path}: vocabulary: expected one for embed_tokens.weight of {rows} rows, found {total} tokens"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def _single(self, text: str) -> int:
        try:
            ids = self.encode([text])[0]
        except Exception as error:  # bare again, from models that are not byte-level BPE
            raise CheckpointError(f"{self.path}: {text!r}: expected one token, found none ({error})") from error
        if len(ids) != 1:
            raise CheckpointError(f"{self.path}: {text!r}: expected one token, found {len(ids)}: {ids}")
        return ids[0]

    @staticmethod
    def _truncate(contents: list[list[int]], prefix: list[int], suffix: list[int], max_length: int) -> list[list[int]]:
        room = max_length - len(prefix) - len(suffix)
        if room < 1:
            raise InputError(
                f"max_length: expected more than the {len(prefix) + len(suffix)} tokens around each input, "
                f"found {max_length}"
            )
        truncated = sum(len(ids) > room for ids in contents)
        if truncated:
            warn(
                f"{truncated} of {len(contents)} inputs were longer than max_length={max_length} tokens and were "
                "truncated"
            )
        return [[*prefix, *ids[:room], *suffix] for ids in contents]
