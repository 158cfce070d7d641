"""Every template of the six checkpoints, as literal strings.

Sources: the model cards of Qwen3-Embedding and Qwen3-Reranker (transformers usage) and the embedding
checkpoints' ``config_sentence_transformers.json``. A checkpoint that declares others has those (layout.py).
"""

import re
from dataclasses import dataclass

EOS = "<|endoftext|>"
"""Closes every embedding input, once; its position is the one that is pooled."""

DEFAULT_TASK = "Given a web search query, retrieve relevant passages that answer the query"

# No space after "Query:", one after "Instruct:".
EMBEDDING_QUERY = "Instruct: {instruction}\nQuery:"
EMBEDDING_PROMPTS = {"query": EMBEDDING_QUERY.format(instruction=DEFAULT_TASK), "document": ""}

RERANKER_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
RERANKER_BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
RERANKER_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
YES, NO = "yes", "no"


def embedding_query(instruction: str) -> str:
    """The prompt put before a query's text for a task of one's own."""
    return EMBEDDING_QUERY.format(instruction=instruction)


FIELDS = ("{instruction}", "{query}", "{document}")


@dataclass(frozen=True)
class Template:
    """A reranker's input: ``prefix + body + suffix``; the body alone depends on the pair, and may be truncated."""

    prefix: str
    body: tuple[str, ...]
    """Texts, and between them ``FIELDS``."""
    suffix: str

    def fill(self, instruction: str, query: str, document: str) -> str:
        """The body of a pair."""
        values = dict(zip(FIELDS, (instruction, query, document), strict=True))
        return "".join(values.get(part, part) for part in self.body)

    def start(self, instruction: str, query: str | None = None) -> str:
        """How the bodies of all pairs of an instruction, and of a query if given, begin."""
        values = dict(zip(FIELDS, (instruction, query, None), strict=True))
        text = ""
        for part in self.body:
            value = values.get(part, part)
            if value is None:
                break
            text += value
        return text


RERANKER = Template(RERANKER_PREFIX, tuple(re.split(f"({'|'.join(FIELDS)})", RERANKER_BODY)), RERANKER_SUFFIX)
