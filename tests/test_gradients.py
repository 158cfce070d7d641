"""encode and predict with their graph: transformers' gradients, torch.func, and no text computed in another's place."""

import pytest
import torch
from tolerances import GRADIENT_TRANSFORMERS, LOGIT_FP32, SAME_TEXT_FP32
from torch.nn import functional as F

from qwen3core import Embedder, InputError, Reranker, capture, edit, pack

TEXTS = ["gravity pulls two bodies", "a violin", "a violin"]
PAIRS = [("gravity", "a force between bodies"), ("gravity", "flour and water, salt and time")]


@pytest.fixture(scope="module")
def opened(embedding_dir, reranker_dir):
    return [kind.from_pretrained(d, dtype="float32", device="cpu") for kind, d in
            ((Embedder, embedding_dir), (Reranker, reranker_dir))]  # fmt: skip


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("ops", ["torch", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_gradients_equal_transformers(embedding_dir, reranker_dir, ops):
    """A cosine's and a logit's, to the input embeddings of each text, and to a weight."""
    transformers = pytest.importorskip("transformers")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    weight = "layers.1.self_attn.v_proj.weight"

    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", ops=ops)
    with capture(embedder, "embed") as acts:
        a, b = embedder.encode(TEXTS[:2], grad=True)
    ours = [*torch.autograd.grad(a @ b, [acts["embed"], embedder.model.get_parameter(weight)])]
    theirs = transformers.AutoModel.from_pretrained(embedding_dir, **options).eval()
    inputs = [theirs.embed_tokens(ids).detach().requires_grad_() for ids in acts.input_ids]
    vectors = [theirs(inputs_embeds=x[None]).last_hidden_state[0, -1] for x in inputs]
    cosine = F.cosine_similarity(vectors[0], vectors[1], dim=0)
    *expected, of_weight = torch.autograd.grad(cosine, [*inputs, theirs.get_parameter(weight)])
    order = acts._records["embed"][0][0].batch.indices.tolist()
    assert relative(ours[0], torch.cat([expected[i] for i in order])) <= GRADIENT_TRANSFORMERS
    assert relative(ours[1], of_weight) <= GRADIENT_TRANSFORMERS

    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu", ops=ops)
    with capture(reranker, "embed") as acts:
        logit = reranker.predict(PAIRS[0], grad=True, logit=True)
    ours = [*torch.autograd.grad(logit, [acts["embed"], reranker.model.get_parameter(weight)])]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(reranker_dir, **options).eval()
    [x] = [theirs.model.embed_tokens(ids).detach().requires_grad_() for ids in acts.input_ids]
    yes, no = (theirs(inputs_embeds=x[None], logits_to_keep=1).logits[0, 0, i] for i in reranker.answers)
    assert (logit - (yes - no)).abs() <= LOGIT_FP32 * max(1, yes.abs().item())
    expected = [*torch.autograd.grad(yes - no, [x, theirs.model.get_parameter(weight)])]
    for mine, other in zip(ours, expected, strict=True):
        assert relative(mine, other) <= GRADIENT_TRANSFORMERS


def test_results_are_those_without_gradients(opened):
    embedder, reranker = opened
    for small in ({}, {"batch_tokens": 60}):
        vectors = embedder.encode(TEXTS, grad=True, **small)
        assert vectors.requires_grad
        assert abs(vectors.detach().numpy() - embedder.encode(TEXTS, **small)).max() <= SAME_TEXT_FP32
    assert embedder.encode(TEXTS[0], grad=True).shape == (64,)
    tokens = embedder.encode_tokens(TEXTS, grad=True)
    assert tokens.vectors.requires_grad
    for logit in (False, True):
        scores = reranker.predict(PAIRS, grad=True, logit=logit)
        assert scores.requires_grad
        assert abs(scores.detach().numpy() - reranker.predict(PAIRS, logit=logit)).max() <= LOGIT_FP32
    assert not embedder.encode(TEXTS, convert_to_tensor=True).requires_grad


def test_each_text_has_a_graph_of_its_own(embedding_dir):
    """Equal texts, a shared prompt and a cached one: every text's own rows are in the graph, and theirs alone."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", prefix_cache_tokens=500)
    embedder.encode_query(TEXTS)  # the cache has the prompt now
    assert len(embedder.prefix_cache) == 1
    seen = []
    embed_tokens = embedder.model.embed_tokens
    handle = embed_tokens.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    try:
        vectors = embedder.encode_query(TEXTS, grad=True)
    finally:
        handle.remove()
    [(input_ids, rows)] = seen
    prompts = embedder.tokenizer.embedding([embedder.query_prompt() + text for text in TEXTS], 8192)
    assert sorted(input_ids.tolist()) == sorted(i for ids in prompts for i in ids)
    gradients = [torch.autograd.grad(vector.sum(), rows, retain_graph=True)[0] for vector in vectors]
    lengths = [int(g.abs().sum(1).gt(0).sum()) for g in gradients]
    assert lengths == [len(ids) for ids in prompts]
    used = torch.stack([g.abs().sum(1).gt(0) for g in gradients])
    assert used.sum(0).tolist() == [1] * len(rows)


def as_function(opened, ops, call):
    """The input embeddings of one text [T, H] to its vector, by an edit of the first point."""
    opened.model.ops = ops
    with capture(opened, "embed") as acts:
        call()

    def function(x):
        with edit(opened, {"embed": lambda _: x}):
            return call()

    return acts["embed"].detach(), function


def test_torch_func_through_the_reference(opened):
    """jvp, jacrev and jacfwd through encode, vmap through the model; each against finite differences or another."""
    embedder, _ = opened
    whole = embedder.model.ops
    try:
        reference = type(whole).reference()
        x, vector = as_function(embedder, reference, lambda: embedder.encode("gravity", grad=True))
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        along = torch.func.jvp(vector, (x,), (direction,))[1]
        jacobian = torch.func.jacrev(vector)(x)
        assert jacobian.shape == (64, *x.shape)
        assert relative(along, torch.einsum("otd,td->o", jacobian, direction)) <= GRADIENT_TRANSFORMERS
        assert relative(torch.func.jacfwd(vector)(x), jacobian) <= GRADIENT_TRANSFORMERS
        batch = pack(embedder.tokenizer.embedding(["gravity"], 99))
        _, embed = as_function(embedder, reference, lambda: embedder.model.embed(batch)[0])
        several = torch.stack([x, x + 0.1 * direction])
        one_by_one = torch.stack([embed(each) for each in several])
        assert (torch.func.vmap(embed)(several) - one_by_one).abs().max() <= SAME_TEXT_FP32
        step = 1e-3
        difference = (embed(x + step * direction) - embed(x - step * direction)) / (2 * step)
        assert relative(along, difference.detach()) <= 1e-2  # float32 and a step: the sign and size of it
    finally:
        embedder.model.ops = whole


def test_forward_mode_through_sdpa_says_what_does_it(opened):
    embedder, _ = opened
    x, vector = as_function(embedder, type(embedder.model.ops).torch(), lambda: embedder.encode("gravity", grad=True))
    with pytest.raises(InputError, match="ops 'torch': attention: expected ops='reference' for forward-mode AD"):
        torch.func.jvp(vector, (x,), (x,))
    assert embedder.model.hooks == []


def test_rounded_weights_have_no_gradients():
    """What would come out is the gradient of the rest of the model."""
    for opened, call in ((Embedder, "encode"), (Reranker, "predict")):
        model = opened.from_pretrained(f"tiny-{opened.jobs[0]}", dtype="int8", device="cpu")
        with pytest.raises(InputError, match="grad: expected weights with gradients, found int8"):
            getattr(model, call)(["gravity", "rain"], grad=True)
