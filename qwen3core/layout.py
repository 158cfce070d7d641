"""What surrounds the decoder, as one frozen value; weights/layout.py reads it from a checkpoint's files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .prompts import DEFAULT_TASK, EMBEDDING_PROMPTS, RERANKER, Template

LAST_TOKEN = ("lasttoken",)
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan", "maxsim", "meanmaxsim")
"""Of vectors, and the last two of late interaction."""


@dataclass(frozen=True)
class Normalize:
    """Unit length."""


@dataclass(frozen=True)
class Dense:
    """``activation(x @ weight.T + bias)``, of sentence-transformers; its weights lie in the folder ``path``."""

    path: str
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"
    """Class of torch.nn."""
    use_residual: bool = False
    """Add x to the result, multiplied by a matrix where the sizes differ."""


@dataclass(frozen=True, repr=False)
class Layout:
    """The surroundings of a decoder; the defaults are those of Qwen3-Embedding's and Qwen3-Reranker's model cards.

    Example:
        >>> layout = Embedder.from_pretrained("tiny-embedding").layout
        >>> layout.job, layout.pooling, layout.closing
        ('embedding', ('lasttoken',), (12000,))
    """

    job: str | None = None
    """``"embedding"``, ``"reranker"``, ``"late interaction"``, ``"chat"``; None where the files do not say."""
    causal: bool = True
    """Whether a token sees only those before it, and itself; else all of its text."""
    pooling: tuple[str, ...] = LAST_TOKEN
    """Modes of ``reference.pool``, side by side."""
    include_prompt: bool = True
    """Whether tokens of the prompt are pooled."""
    special_tokens: tuple[str, ...] = ()
    """Tokens that, at the end of a prompt by itself, do not count as the prompt's."""
    modules: tuple[Dense | Normalize, ...] = ()
    """What pooled vectors pass through: of late interaction, all tokens."""
    normalize: bool = True
    """Unit length at the end."""
    truncate_dim: int | None = None
    """Length that vectors are cut to, before they are normalised; None: whole."""
    similarity: str = "cosine"
    """``"cosine"``, ``"dot"``, ``"euclidean"``, ``"manhattan"``; of late interaction ``"maxsim"``, ``"meanmaxsim"``."""
    prompts: Mapping[str, str] = field(default_factory=lambda: EMBEDDING_PROMPTS)
    """What is put before embedding inputs, by name."""
    default_prompt_name: str | None = None
    """The prompt where a call names none; None: no prompt."""
    score: str = "lm_head"
    """Where a reranker's score comes from: rows of ``lm_head``, of ``score``, or the last of ``modules``."""
    answers: tuple[int, ...] = ()
    """Tokens of the lm_head: the score is the first one's logit, less that of the second; empty: yes and no."""
    labels: tuple[str, ...] = ("yes",)
    """What each number of a score says."""
    activation: str = "Sigmoid"
    """Class of torch.nn that a score passes through."""
    template: Template = RERANKER
    """What surrounds a reranker's pair."""
    instruction: str = DEFAULT_TASK
    """Where a call gives none."""
    opening: tuple[int, ...] = ()
    """Tokens before an embedding input."""
    closing: tuple[int, ...] = ()
    """Tokens after an embedding input."""
    max_length: int | None = None
    """Tokens per input, where a call says nothing; None: the decoder's limit."""
    lower_case: bool = False
    """Whether text is put in lower case first."""
    query_length: int | None = None
    """Tokens of a query, of late interaction; None: ``max_length``."""
    document_length: int | None = None
    """The same of a document."""
    skiplist: tuple[str, ...] = ()
    """Tokens of documents that late interaction leaves out."""

    def __repr__(self) -> str:
        """What differs from the model cards, beside job, mask and pooling."""
        usual = Layout()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: v for k, v in values.items() if k in ("job", "causal", "pooling") or v != getattr(usual, k)}
        return f"Layout({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def width(self, hidden_size: int) -> int:
        """Length of the vectors: of texts, or of late interaction's tokens."""
        sizes = [module.out_features for module in self.modules if isinstance(module, Dense)]
        return sizes[-1] if sizes else hidden_size * max(1, len(self.pooling))
