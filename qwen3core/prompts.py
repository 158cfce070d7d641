"""Every template of the six checkpoints, as literal strings.

Sources: the model cards of Qwen3-Embedding and Qwen3-Reranker (transformers usage) and the embedding
checkpoints' ``config_sentence_transformers.json``. The reranker's template is never taken from the repository's
chat template, which changed in 2026 and no longer gives these bytes.
"""

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


def reranker_body(instruction: str, query: str, document: str) -> str:
    """The part of the reranker's input that depends on the pair, and the only part that may be truncated."""
    return RERANKER_BODY.format(instruction=instruction, query=query, document=document)
