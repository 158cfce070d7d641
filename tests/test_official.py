"""The published results, on the official checkpoints; each test runs as soon as its checkpoint is in the local cache.

hf download Qwen/Qwen3-Embedding-0.6B && pytest -m official
"""

import huggingface_hub
import numpy as np
import pytest
from tolerances import PUBLISHED_BF16, PUBLISHED_FP32, PUBLISHED_LOGIT_FP32

from qwen3core import Embedder, Reranker
from qwen3core.parity import parity
from qwen3core.weights.synthesize import LAYOUTS

pytestmark = pytest.mark.official

PLANET = "Which planet is known as the Red Planet?"
PLANETS = [
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
]


def cached(name):
    """The hub id, if its checkpoint is in the local cache; else skip, saying so."""
    repository = f"Qwen/{name}"
    for file in ("model.safetensors", "model.safetensors.index.json"):
        if isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
            return repository
    pytest.skip(f"{repository} is not in the local cache (hf download {repository})")


def test_embedding_model_card():
    """Qwen3-Embedding-0.6B model card, transformers, float32."""
    embedder = Embedder.from_pretrained(cached("Qwen3-Embedding-0.6B"), dtype="float32")
    queries = embedder.encode_query(["What is the capital of China?", "Explain gravity"])
    documents = embedder.encode_document(
        [
            "The capital of China is Beijing.",
            "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and "
            "is responsible for the movement of planets around the sun.",
        ]
    )
    published = [[0.7645568251609802, 0.14142508804798126], [0.13549736142158508, 0.5999549627304077]]
    np.testing.assert_allclose(queries @ documents.T, published, atol=PUBLISHED_FP32, rtol=0)


def test_embedding_sentence_transformers():
    """sentence-transformers' own test of Qwen3-Embedding-0.6B, bfloat16."""
    embedder = Embedder.from_pretrained(cached("Qwen3-Embedding-0.6B"), dtype="bfloat16")
    cosines = embedder.encode_query(PLANET) @ embedder.encode_document(PLANETS).T
    np.testing.assert_allclose(cosines, [0.4838, 0.69335, 0.58793, 0.6647], atol=PUBLISHED_BF16, rtol=0)


def test_reranker_sentence_transformers():
    """sentence-transformers' own test of Qwen3-Reranker-0.6B, float32: logits of yes minus no."""
    reranker = Reranker.from_pretrained(cached("Qwen3-Reranker-0.6B"), dtype="float32")
    scores = reranker.predict([(PLANET, document) for document in PLANETS]).astype(np.float64)
    published = [-3.109297752380371, 7.120389938354492, -0.3787546157836914, 3.541637420654297]
    np.testing.assert_allclose(np.log(scores / (1 - scores)), published, atol=PUBLISHED_LOGIT_FP32, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.endswith("small")])
def test_parity_with_transformers(name, dtype):
    pytest.importorskip("transformers")
    report = parity(cached(name), dtype=dtype)
    assert report.ok, str(report)
