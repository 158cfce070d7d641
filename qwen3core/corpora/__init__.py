"""Corpora of any size: texts of files or URLs to shards of Parquet, which a killed run goes on with.

    from qwen3core.corpora import Embed, embed_corpus

    embed_corpus(Embed("tiny-embedding"), ["texts.jsonl"], "vectors")

Reading order: blocks -> stage -> shards. A stage is also what Ray Data's ``map_batches`` takes.
"""

from .blocks import Block, read_blocks
from .shards import ROWS_PER_SHARD, embed_corpus
from .stage import Embed

__all__ = ["ROWS_PER_SHARD", "Block", "Embed", "embed_corpus", "read_blocks"]
