"""What bodies may hold, and what answers look like; what a request may not hold is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from ..errors import check_unicode

MAX_ITEMS = 2048
"""Texts of a request, as OpenAI has it."""


def _unicode(value: str) -> str:
    check_unicode("text", value)
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Many = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _kind(value: Any) -> str:
    """Which kind of input this is: a tag of ``Input``, by its first item."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else None
    return "<ids>" if isinstance(first, int) else "<lists of ids>" if isinstance(first, list) else "<texts>"


Input = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Many, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ITEMS), Tag("<lists of ids>")],
    Discriminator(_kind),
]
Texts = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Many, Tag("<texts>")],
    Discriminator(lambda value: "<texts>" if isinstance(value, list) else "<text>"),
]
Model = Annotated[Text | None, Field(description="A name of /v1/models; by default the first that fits.")]
Instruction = Annotated[Text | None, Field(description="The task, in one sentence; by default the checkpoint's.")]


class Body(BaseModel):
    """A request's: types are exact, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EmbeddingRequest(Body):
    """OpenAI's, and beside it which prompt is put before the input."""

    input: Annotated[
        Input, Field(description="A text, texts, or one or more texts' token ids of the checkpoint's own.")
    ]
    model: Model = None
    dimensions: Annotated[int | None, Field(ge=1, description="First components only, normalised again.")] = None
    encoding_format: Annotated[Literal["float", "base64"], Field(description="base64: of little-endian float32.")] = (
        "float"
    )
    user: Annotated[Text | None, Field(description="Not used.")] = None
    input_type: Annotated[Literal["query", "document"] | None, Field(description="Whose prompt is put before.")] = None
    prompt_name: Annotated[Text | None, Field(description="A prompt of the checkpoint's.")] = None
    instruction: Annotated[Text | None, Field(description="The input is queries, of this task, in a sentence.")] = None
    truncate: Annotated[bool, Field(description="Cut inputs that are too long, in place of an error.")] = False


class Document(Body):
    """A document as an object."""

    text: Text


Documents = Annotated[
    list[
        Annotated[
            Annotated[Text, Tag("<text>")] | Annotated[Document, Tag("<object>")],
            Discriminator(lambda value: "<object>" if isinstance(value, dict | Document) else "<text>"),
        ]
    ],
    Field(min_length=1, max_length=MAX_ITEMS),
]


class RerankRequest(Body):
    """Cohere's and Jina's; documents that are too long lose their end, as theirs do."""

    query: Text
    documents: Documents
    model: Model = None
    top_n: Annotated[int | None, Field(ge=1, description="Only the best.")] = None
    return_documents: Annotated[bool | None, Field(description="By default true, but for /v2.")] = None
    instruction: Instruction = None
    truncate: bool = True


class TextsRerankRequest(Body):
    """That of text-embeddings-inference."""

    query: Text
    texts: Many
    model: Model = None
    raw_scores: Annotated[bool, Field(description="Scores before the sigmoid.")] = False
    return_text: bool = False
    instruction: Instruction = None
    truncate: bool = False


AnyRerankRequest = Annotated[
    Annotated[RerankRequest, Tag("<documents>")] | Annotated[TextsRerankRequest, Tag("<texts>")],
    Discriminator(lambda value: "<texts>" if isinstance(value, dict) and "texts" in value else "<documents>"),
]


class ScoreRequest(Body):
    """vLLM's: a text beside each of several, or as many pairs as there are."""

    text_1: Annotated[Texts, Field(description="The query, or queries.")]
    text_2: Annotated[Texts, Field(description="The document, or documents.")]
    model: Model = None
    instruction: Instruction = None
    truncate: bool = False


class TokenizeRequest(Body):
    """vLLM's."""

    prompt: Text
    model: Model = None
    add_special_tokens: Annotated[bool, Field(description="With what is put around an embedding input.")] = True


class Usage(BaseModel):
    """Tokens, those of prompts and templates included."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """A text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """OpenAI's."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Ranked(BaseModel):
    """A document's score: P(yes)."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Cohere's and Jina's, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: Usage
    meta: dict[str, dict[str, Any]] = {}


class TextRanked(BaseModel):
    """A text's score, best first."""

    index: int
    score: float
    text: str | None = None


class Score(BaseModel):
    """A pair's."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    """vLLM's."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class TokenizeResponse(BaseModel):
    """vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]


class ModelCard(BaseModel):
    """A checkpoint that is open."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen3core"
    max_model_len: int
    job: str


class ModelList(BaseModel):
    """OpenAI's."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok"] = "ok"


class Fault(BaseModel):
    """What is wrong, and which field says so."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's."""

    error: Fault
