"""Random surroundings of a decoder: the truth's numbers, or a refusal that says why, and nothing else.

``LAYOUT_EXAMPLES=5000`` tries more of them than a run of all tests does.
"""

import json
import os
import warnings
from itertools import count

import layouts
import pytest
from checkpoint_files import clear
from layouts import NORMALIZE, WIDTH, adapter, closing, copy, dense, edit, modules, pooling, random, weights, write
from test_layouts import LEGACY, MODES, TOLERANCE, YARN
from tokenizers import Tokenizer

from qwen3core import CheckpointError, InputError

pytest.importorskip("hypothesis")
pytest.importorskip("sentence_transformers")
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LAYOUT_EXAMPLES", "100"))
KINDS = {"embedding": (0.5, 0.6), "reranker": (0.4, 0.25), "late interaction": (0.1, 0.8)}
"""Their shares of the examples, and the least share of each that is honoured, of those that the truth opens."""

TEXT = st.sampled_from(
    [
        *("", " ", "What is gravity?", "The capital of China is Beijing.\n", "\n\n  北京 ", "UPPER Ünïcode", "a" * 40),
        *("stop <|im_end|> here", "<think>hm</think>", "0", "{{ 1 }} {% if %}", "gravity pulls. " * 12, "yes"),
    ]
)
PROMPT_TEXT = st.sampled_from(
    ["", "query: ", "Instruct: find\nQuery:", "Q", "<|im_start|>", "Find it.\n\n", "search_query: UPPER ", "x " * 20]
)
ACTIVATIONS = ["Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "Softplus", "Hardtanh"]
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|fim_pad|>"]


def rarely(draw, strategy, default=None, times=4):
    """A value of the strategy once in so many times."""
    return draw(strategy) if draw(st.integers(1, times)) == times else default


def decoder(draw, d):
    """What changes the numbers of the layers, and what does not."""
    if rarely(draw, st.booleans()):
        edit(d, "config.json", is_causal=draw(st.booleans()))
    rope = draw(st.sampled_from([None, None, "default", "theta", "yarn", "yarn 4"]))
    if rope == "theta":
        edit(d, "config.json", rope_theta=draw(st.sampled_from([1e4, 5e5])))
    elif rope == "default":
        edit(
            d, "config.json", "rope_theta", "rope_scaling", rope_parameters={"rope_theta": 1e5, "rope_type": "default"}
        )
    elif rope:
        more = {"beta_fast": 16.0} if draw(st.booleans()) else {"attention_factor": 1.2} if draw(st.booleans()) else {}
        yarn = {**YARN, "original_max_position_embeddings": draw(st.sampled_from([64, 8192, 32768])), **more}
        if rope == "yarn":
            edit(d, "config.json", "rope_theta", "rope_scaling", rope_parameters={**yarn, "rope_theta": 1e6})
        else:
            edit(d, "config.json", rope_scaling=yarn)
    if draw(st.booleans()):
        edit(d, "config.json", "torch_dtype", dtype="float32")
    if rarely(draw, st.just(True)):
        edit(d, "config.json", use_cache=False, transformers_version="5.1.0", attention_dropout=0.3, unknown=[1])


def texts_to_ids(draw, d, closed):
    """tokenizer.json and its settings; ``closed``: whether a token must close each text."""
    if draw(st.booleans()):
        tokens = draw(st.lists(st.sampled_from(SPECIAL), min_size=closed, max_size=2))
        closing(d, *tokens, opening=rarely(draw, st.lists(st.sampled_from(SPECIAL[1:]), max_size=1), []))
    if rarely(draw, st.just(True)):
        path = str(d / "tokenizer.json")
        tok = Tokenizer.from_file(path)
        tok.enable_truncation(9)
        tok.enable_padding(length=40)
        tok.save(path)
    names = ("model_max_length", "add_eos_token", "add_bos_token", "padding_side", "tokenizer_class", "pad_token")
    changes = {
        "model_max_length": st.sampled_from([7, 20, 33, 64, 100000, 1e30]),
        "padding_side": st.sampled_from(["left", "right"]),
        "tokenizer_class": st.sampled_from(["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"]),
        "pad_token": st.sampled_from(["<|endoftext|>", "<|im_end|>"]),
    }
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        edit(d, "tokenizer_config.json", **{name: draw(changes.get(name, st.booleans()))})


def prompts_of(draw):
    names = st.sampled_from(["query", "document", "web", "sts"])
    return draw(st.dictionaries(names, PROMPT_TEXT, max_size=3))


def pooled(draw):
    modes = draw(st.lists(st.sampled_from(MODES), min_size=1, max_size=3 if draw(st.booleans()) else 1))
    spelling = draw(st.sampled_from(["new", "new", "list", "legacy"]))
    more = {"include_prompt": draw(st.booleans())} if draw(st.booleans()) else {}
    if spelling == "legacy":
        modes = [mode for mode in MODES if mode in modes]
        keys = {f"pooling_mode_{key}": mode in modes for key, mode in zip(LEGACY, MODES, strict=True)}
        return modes, ("Pooling", {"word_embedding_dimension": WIDTH, **keys, **more})
    return modes, pooling(modes if spelling == "list" or len(modes) > 1 else modes[0], **more)


def after(draw, width, last=None):
    """Dense and Normalize on vectors of this width; ``last``: a Dense that gives as many scores."""
    chain = []
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["Dense", "Normalize", "Dropout"]))
        if kind == "Dense":
            rows = draw(st.sampled_from([8, 24, width]))
            more = {"bias": draw(st.booleans())} | ({"use_residual": True} if draw(st.booleans()) else {})
            chain.append(dense(width, rows, draw(st.sampled_from(ACTIVATIONS)), **more))
            width = rows
        else:
            chain.append(NORMALIZE if kind == "Normalize" else ("Dropout", {"dropout": 0.3}))
    if last:
        chain.append(dense(width, last, draw(st.sampled_from(["Identity", "Tanh"])), module_output_name="scores"))
    elif draw(st.booleans()):
        chain.append(NORMALIZE)
    return chain


def limits(draw):
    return {"max_seq_length": draw(st.integers(4, 90))} if draw(st.booleans()) else {}


def embedding(draw, d):
    modes, module = pooled(draw)
    modules(d, module, *after(draw, WIDTH * len(modes)), legacy=draw(st.booleans()))
    texts_to_ids(draw, d, closed="lasttoken" in modes)
    stored = prompts_of(draw)
    found = {
        "prompts": stored,
        "similarity_fn_name": draw(st.sampled_from(["cosine", "dot", "euclidean", "manhattan"])),
    }
    if stored and draw(st.booleans()):
        found["default_prompt_name"] = draw(st.sampled_from(sorted(stored)))
    if rarely(draw, st.just(True)):
        found |= {"truncate_dim": draw(st.integers(1, 70)), "unknown": 1}
    write(d, "config_sentence_transformers.json", found)
    lower = {"do_lower_case": True} if rarely(draw, st.just(True)) else {}
    write(d, "sentence_bert_config.json", limits(draw) | lower)


def late_interaction(draw, d):
    lengths = {k: draw(st.integers(4, 40)) for k in ("query_length", "document_length") if draw(st.booleans())}
    words = draw(st.lists(st.sampled_from([".", "?", "a", "nowhere-else"]), max_size=3))
    mask = {"skiplist_words": words} if draw(st.booleans()) else {}
    more = {"similarity_fn_name": draw(st.sampled_from(["maxsim", "meanmaxsim"]))}
    layouts.late_interaction(d, mask=mask, prompts=prompts_of(draw), **more)
    texts_to_ids(draw, d, closed=True)
    write(d, "sentence_bert_config.json", limits(draw) | lengths)


def template(draw):
    """A chat template of random shape, most of which are the pair between fixed texts."""

    def content(role):
        form = draw(st.sampled_from(["map", "map", "first", "loop", "variable"]))
        end = draw(st.sampled_from([""] * 12 + [" | string", " | trim", " | e"]))
        select = f'messages | selectattr("role", "eq", "{role}")'
        if form == "first":
            return f"{{{{ ({select} | first).content{end} }}}}"
        if form == "loop":
            return f'{{% for m in messages if m.role == "{role}" %}}{{{{ m["content"]{end} }}}}{{% endfor %}}'
        if form == "variable":
            return f'{{%- set x = {select} | map(attribute="content") | first %}}{{{{ x{end} }}}}'
        return f'{{{{ {select} | map(attribute="content") | first{end} }}}}'

    instruction = draw(st.sampled_from(["none", "default", "default", "if", "always"]))
    system = content("system")
    if instruction == "default":
        system = (
            '{{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default("Find.") }}'
        )
    label = draw(st.sampled_from(["<Instruct>: {}\n", "Task: {}", "{}\n\n"]))
    part = {"none": "", "default": label.format(system), "always": label.format(system)}.get(instruction)
    if part is None:
        part = f'{{% if messages[0].role == "system" %}}{label.format(system)}{{% endif %}}'
    gap = st.sampled_from(
        ["\n", "\n\n", " ", "{# note #}\n", "<|im_end|>\n<|im_start|>user\n", "\n{%- set y = 1 -%}\n", ""]
    )
    roles = [("query", draw(st.sampled_from(["<Query>: ", "Q:", ""]))), ("document", "<Document>: ")]
    roles = roles if draw(st.booleans()) else roles[::-1]
    parts = [part, *(mark + content(role) for role, mark in roles)]
    if not draw(st.integers(0, 3)):
        parts = parts[1:] + parts[:1]
    body = parts[0] + draw(gap).join(parts[1:])
    judge = draw(st.sampled_from(["", "<|im_start|>system\nJudge.<|im_end|>\n", "{{ bos_token }}", "Relevant?\n"]))
    ends = [
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "{{ eos_token }}\n",
        "<|im_end|><|endoftext|>",
        "<|im_end|>\n<think>\n\n</think>\n\n\n",
    ]
    end = draw(st.sampled_from([*ends, *ends, "\n<|im_end|>\n", ""]))
    whole = judge + draw(st.sampled_from(["<|im_start|>user\n", ""])) + body + end
    return whole + draw(st.sampled_from(["", "{% if add_generation_prompt %}<think>{% endif %}"]))


def reranker(draw, d):
    stored = prompts_of(draw)
    options = {"template": draw(st.sampled_from(sorted(layouts.TEMPLATES.values()))), "prompts": stored, **limits(draw)}
    options |= {"do_lower_case": True} if rarely(draw, st.just(True)) else {}
    if draw(st.integers(0, 3)):
        options["template"] = template(draw)
    if stored and draw(st.booleans()):
        options["default"] = draw(st.sampled_from(sorted(stored)))
    if rarely(draw, st.just(True)):
        options["processing_kwargs"] = {"chat_template": {"add_generation_prompt": True}}
    head = draw(st.sampled_from(["LogitScore", "LogitScore", "score", "Dense"]))
    activations = ["linear.Identity", "activation.Sigmoid", *(["activation.Tanh"] if head != "LogitScore" else [])]
    if draw(st.booleans()):
        options["activation"] = draw(st.sampled_from(activations))
    if head == "LogitScore":
        answers = st.sampled_from(["yes", "no", "1", "0", "a", "<|im_end|>"])
        layouts.logit_score(d, draw(answers), draw(answers | st.none()), **options)
        if rarely(draw, st.just(True)):
            shape = (Tokenizer.from_file(str(d / "tokenizer.json")).get_vocab_size(), WIDTH)
            weights(d, lambda tensors: tensors.update({"lm_head.weight": random(*shape, seed=1)}))
    elif head == "score":
        layouts.classifier(d, draw(st.integers(1, 3)), **options)
        if rarely(draw, st.just(True)):
            edit(d, "config.json", pad_token_id=layouts.token_id(d, draw(st.sampled_from(SPECIAL))))
    else:
        modes, module = pooled(draw)
        layouts.pooled_score(d, module, *after(draw, WIDTH * len(modes), draw(st.integers(1, 3))), **options)
    texts_to_ids(draw, d, closed=False)


WRITERS = {"embedding": embedding, "reranker": reranker, "late interaction": late_interaction}


def describe(directory):
    """The files that were drawn, for whoever reads a failure."""
    for path in sorted(directory.rglob("*.json*")):
        if path.name not in ("tokenizer.json", "vocab.json"):
            note(f"{path.relative_to(directory)}: {path.read_text('utf-8')}")
    note(f"post_processor: {json.loads((directory / 'tokenizer.json').read_text('utf-8'))['post_processor']}")


def answer(question, directory, inputs, errors):
    """The numbers, or one of these errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return question(directory, inputs)
        except errors as error:
            return error


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_or_a_refusal(bases, tmp_path, kind):
    share, at_least = KINDS[kind]
    number, seen = count(), {"honoured": 0, "refused": 0}

    @settings(
        max_examples=round(EXAMPLES * share),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def every(data):
        directory = copy(bases[kind], tmp_path / str(next(number)))
        WRITERS[kind](data.draw, directory)
        decoder(data.draw, directory)
        if rarely(data.draw, st.just(True), times=6):
            adapter(directory, use_rslora=data.draw(st.booleans()))
        inputs = data.draw(st.lists(TEXT, min_size=1, max_size=5))
        if kind == "reranker":
            inputs = [(query, text) for query in data.draw(st.lists(TEXT, min_size=1, max_size=2)) for text in inputs]
        describe(directory)
        truth = answer(layouts.TRUTH[kind], directory, inputs, Exception)
        if isinstance(truth, Exception):
            return  # no finding: the truth itself does not open it
        ours = answer(layouts.OURS[kind], directory, inputs, (CheckpointError, InputError))
        if isinstance(ours, Exception):
            assert clear(str(ours)), ours
            seen["refused"] += 1
            return
        found = layouts.difference(ours, truth)
        assert found <= TOLERANCE[kind], found
        seen["honoured"] += 1

    every()
    assert seen["honoured"] >= at_least * sum(seen.values()) > 0, seen
