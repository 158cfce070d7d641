"""Text to token ids by the checkpoints' conventions: only content is ever truncated, never EOS, never a template."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers

from . import prompts
from .errors import CheckpointError, InputError, check_texts, warn
from .prompts import FIELDS, RERANKER, Template


class Tokenizer:
    """A checkpoint's tokenizer.json.

    Of its post-processor only the tokens that it puts around a text are used, of embedding inputs: ``opening`` and
    ``closing``; its truncation and padding are not. Threads may share a tokenizer; copies keep its settings.

    Args:
        path: a tokenizer.json.
        split_special_tokens: read text that spells a special token (``<|im_end|>``) as plain text, for texts that are
            not trusted; by default it becomes that token, as in transformers. As there, tokens that tokenizer.json
            does not mark as special (``<think>``, ``<tool_call>``) are recognised either way; they cannot end a turn.
        template: what surrounds a reranker's pair.
        lower_case: put text in lower case first.
        closes: where tokenizer.json closes texts by nothing, ``<|endoftext|>`` does, exactly once.

    Raises:
        CheckpointError: where the file is missing, broken, or has no ``<|endoftext|>``; for a template that cannot be
            split into a beginning, what may be truncated, and an end.
        InputError: for split_special_tokens where the template has special tokens between query and document.

    Example:
        >>> tokenizer = Tokenizer(find("tiny-embedding") / "tokenizer.json")
        >>> [ids] = tokenizer.embedding(["gravity"], max_length=512)
        >>> tokenizer.decode(ids)
        'gravity<|endoftext|>'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split_special_tokens: bool = False,
        template: Template = RERANKER,
        lower_case: bool = False,
        closes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.split_special_tokens = split_special_tokens
        if not self.path.is_file():
            found = "a directory" if self.path.is_dir() else "nothing"
            raise CheckpointError(f"{self.path}: expected a tokenizer file, found {found}")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{self.path}: expected a tokenizer, found something else ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        if lower_case:  # first of all, as sentence-transformers does it
            others = [self.backend.normalizer] if self.backend.normalizer else []
            self.backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """Ids of the tokens that tokenizer.json marks as special."""
        self.backend.encode_special_tokens = False
        self.eos = self.single(prompts.EOS)
        """Id of ``<|endoftext|>``."""
        self.opening, self.closing = self._post_processor()
        self.appends_eos = closes and not self.closing
        """Whether EOS comes from here, not from tokenizer.json."""
        if self.appends_eos:
            self.closing = [self.eos]
        self.template = self._split(template)
        self.prefix, self.suffix, fixed = self.encode(
            [self.template.prefix, self.template.suffix, self.template.fill("", "", "")]
        )
        self._fixed_special = self._special(fixed)
        if split_special_tokens and self._fixed_special:
            raise InputError(
                "split_special_tokens: expected a template without special tokens between query and document, found "
                f"{self.template.body!r}"
            )
        # Once and for all, after the templates: threads share the backend.
        self.backend.encode_special_tokens = split_special_tokens

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy (copy, pickle): the tokenizers library itself does not keep ``encode_special_tokens``."""
        self.__dict__ |= state
        self.backend.encode_special_tokens = self.split_special_tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts alone. Raises InputError, naming the index, for what is not Unicode text."""
        check_texts(texts)
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def embedding(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text, then EOS; at most ``max_length`` each, with one warning for all that were truncated."""
        return self.close(self.encode(texts), max_length)

    def close(self, token_ids: list[list[int]], max_length: int) -> list[list[int]]:
        """Each text's ids, cut to leave place for them, between the opening and the closing tokens."""
        return self._truncate(token_ids, self.opening, self.closing, max_length)

    def reranking(self, bodies: Sequence[str], max_length: int) -> list[list[int]]:
        """Prefix, body, suffix, joined as ids; the body alone is truncated. Warns where a body holds special tokens."""
        return self.apply_template(self.encode(bodies), max_length)

    def apply_template(self, token_ids: list[list[int]], max_length: int) -> list[list[int]]:
        """Each body's ids, cut to leave place for them, between the template's prefix and suffix."""
        special = sum(self._special(ids) > self._fixed_special for ids in token_ids)
        if special:
            warn(
                f"{special} of {len(token_ids)} inputs contain special tokens such as <|im_end|>, which can close the "
                "template early; pass split_special_tokens=True to from_pretrained to read them as plain text"
            )
        return self._truncate(token_ids, self.prefix, self.suffix, max_length)

    def yes_no(self) -> tuple[int, int]:
        """Ids of the two answers. Raises CheckpointError where one is not a single token."""
        return self.single(prompts.YES), self.single(prompts.NO)

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

    def single(self, text: str) -> int:
        """The id of a text that is one token. Raises CheckpointError where it is not."""
        try:
            ids = self.encode([text])[0]
        except Exception as error:  # bare again, from models that are not byte-level BPE
            raise CheckpointError(f"{self.path}: {text!r}: expected one token, found none ({error})") from error
        if len(ids) != 1:
            raise CheckpointError(f"{self.path}: {text!r}: expected one token, found {len(ids)}: {ids}")
        return ids[0]

    def _special(self, ids: list[int]) -> int:
        return 0 if self.special_ids.isdisjoint(ids) else sum(i in self.special_ids for i in ids)

    def _post_processor(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        plain, whole = (self.backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        raise CheckpointError(f"{self.path}: post_processor: expected tokens around a text, found others inside it")

    def _split(self, template: Template) -> Template:
        """The template with its fixed beginning and end, up to the nearest special tokens, outside of its body.

        There, and nowhere else, ids of the parts are those of the whole.
        """
        added = self.backend.get_added_tokens_decoder().values()
        apart = [t.content for t in added if not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
        token = re.compile("|".join(map(re.escape, sorted(apart, key=len, reverse=True))) or "(?!)")
        first, *body = template.body if template.body[0] not in FIELDS else ("", *template.body)
        *body, last = body if body[-1] not in FIELDS else (*body, "")
        start = max((match.end() for match in token.finditer(first)), default=0)
        after = body[-1] + last if body[-1] == FIELDS[0] else last  # which truncation leaves as it is
        if after and not token.match(after):
            raise CheckpointError(
                f"{self.path.parent}: chat template: expected a special token after the last of query and document, "
                f"where truncation ends, found {after!r}"
            )
        return Template(template.prefix + first[:start], (first[start:], *body), last + template.suffix)

    @staticmethod
    def _truncate(token_ids: list[list[int]], prefix: list[int], suffix: list[int], max_length: int) -> list[list[int]]:
        longest = max_length - len(prefix) - len(suffix)
        if longest < 1:
            raise InputError(
                f"max_length: expected more than the {len(prefix) + len(suffix)} tokens around each input, "
                f"found {max_length}"
            )
        truncated = sum(len(ids) > longest for ids in token_ids)
        if truncated:
            warn(
                f"{truncated} of {len(token_ids)} inputs were longer than max_length={max_length} tokens and were "
                "truncated"
            )
        return [[*prefix, *ids[:longest], *suffix] for ids in token_ids]
