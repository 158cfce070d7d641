"""Exports: each opens in the runtimes that it is for, with PyTorch's numbers, or is refused by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

import layouts
import numpy as np
import pytest
from conftest import ROOT
from tolerances import EXPORTED, EXPORTED_INT8, LLAMA_CPP

from qwen3core import Embedder, InputError, Reranker, samples
from qwen3core.commands import main
from qwen3core.export import FORMATS, export, onnx, source
from qwen3core.weights.find import find

TEXTS = [
    "gravity",
    "Rain fell on the violin in the evening; it's 12345 tokens\n\nand   spaces, Ünïcode, 北京.",
    "the violin is an instrument " * 20,
]
DOCUMENTS = list(samples.DEMO_DOCUMENTS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(model, format, dtype): the path of what is written once for all tests of this file."""

    @cache
    def write(model, format, dtype="float32"):
        path = tmp_path_factory.mktemp("exported") / f"{model}.{format}"
        export(model, path, format=format, dtype=dtype)
        return path

    return write


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu")


def padded(sequences, left):
    """Ids and mask [B, L] of sequences, padded on the left or on the right by a token that changes vectors."""
    length = max(map(len, sequences)) + 2
    ids, mask = np.full((len(sequences), length), 7), np.zeros((len(sequences), length), np.int64)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


def sequences_of(reranker):
    """Ids of the pairs of the demo's query and documents."""
    fill, instruction = reranker.tokenizer.template.fill, reranker.layout.instruction
    bodies = [fill(instruction, samples.DEMO_QUERY, text) for text in DOCUMENTS]
    return reranker.tokenizer.reranking(bodies, reranker.max_length)


def onnxruntime(path, names, sequences):
    """Outputs of these names for sequences padded on the left, on the right, and for the first of them alone."""
    from onnxruntime import InferenceSession

    session = InferenceSession(next(path.glob("onnx/*.onnx")), providers=["CPUExecutionProvider"])
    batches = [padded(sequences, True), padded(sequences, False), padded(sequences[:1], True)]
    return [session.run(names, batch) for batch in batches]


def openvino(path, names, sequences):
    """The same in OpenVINO."""
    import openvino

    model = openvino.compile_model(path / "openvino/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batches = [padded(sequences, True), padded(sequences, False), padded(sequences[:1], True)]
    return [[out[name] for name in names] for out in map(model, batches)]


GRAPHS = {"onnx": onnxruntime, "openvino": openvino}


@pytest.mark.parametrize(
    ("format", "dtype"), [(f, d) for f in GRAPHS for d in FORMATS[f].dtypes if d.startswith("float")]
)
def test_graph_gives_the_vectors_whatever_the_padding(exported, embedder, format, dtype):
    path = exported("tiny-embedding", format, dtype)
    expected = embedder.encode(TEXTS)
    sequences = embedder.tokenizer.embedding(TEXTS, embedder.max_length)
    tokens = embedder.encode_tokens(TEXTS)
    for vectors, hidden in GRAPHS[format](path, ["sentence_embedding", "last_hidden_state"], sequences):
        n = len(vectors)
        assert np.abs(vectors - expected[:n]).max() <= EXPORTED
        assert hidden.shape[2] == embedder.model.config.hidden_size
    unit = hidden[0, 2:] / np.linalg.norm(hidden[0, 2:], axis=1, keepdims=True)
    assert np.abs(unit - tokens.vectors[: tokens.lengths[0]].numpy()).max() <= EXPORTED


def test_graph_is_right_by_the_words_of_onnx(bases, tmp_path):
    """In ONNX's own reference, too, rows of padding on the left, which see nothing, spoil no others."""
    from onnx.reference import ReferenceEvaluator

    embedder = Embedder.from_pretrained(bases["embedding"], dtype="float32", device="cpu")
    export(bases["embedding"], tmp_path / "out", format="onnx")
    sequences = embedder.tokenizer.embedding(TEXTS[:2], embedder.max_length)
    evaluator = ReferenceEvaluator(str(tmp_path / "out/onnx/model.onnx"))
    vectors: Any = evaluator.run(["sentence_embedding"], padded(sequences, True))
    assert np.abs(vectors[0] - embedder.encode(TEXTS[:2])).max() <= EXPORTED


@pytest.mark.parametrize("format", GRAPHS)
def test_graph_gives_p_yes(exported, reranker, format):
    pairs = [(samples.DEMO_QUERY, text) for text in DOCUMENTS]
    expected = [reranker.predict(pairs, logit=True), reranker.predict(pairs)]
    for found in GRAPHS[format](exported("tiny-reranker", format), ["logits", "scores"], sequences_of(reranker)):
        for ours, theirs in zip(expected, found, strict=True):
            assert np.abs(theirs[:, 0] - ours[: len(theirs)]).max() <= EXPORTED


def test_int8_of_onnx_is_near(exported, embedder):
    path = exported("tiny-embedding", "onnx", "int8")
    sequences = embedder.tokenizer.embedding(TEXTS, embedder.max_length)
    for [vectors] in onnxruntime(path, ["sentence_embedding"], sequences):
        distance = 1 - (vectors * embedder.encode(TEXTS)[: len(vectors)]).sum(1)
        assert 1e-6 < distance.max() <= EXPORTED_INT8
    sizes = [next(exported("tiny-embedding", "onnx", d).glob("onnx/*")).stat().st_size for d in ("float32", "int8")]
    assert sizes[1] < 0.45 * sizes[0]


def test_large_weights_lie_in_a_file_beside_the_graph(exported, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "FILE_LIMIT", 10**6)
    out = tmp_path / "out"
    export("tiny-embedding", out, format="onnx")
    assert {path.name for path in (out / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert (out / "onnx/model.onnx").stat().st_size < 10**6
    assert json.loads((out / "config.json").read_text("utf-8"))["transformers.js_config"]["use_external_data_format"]
    sequences = embedder.tokenizer.embedding(TEXTS, embedder.max_length)
    [vectors], *_ = onnxruntime(out, ["sentence_embedding"], sequences)
    assert np.abs(vectors - embedder.encode(TEXTS)).max() <= EXPORTED


@pytest.mark.parametrize("format", GRAPHS)
def test_graph_holds_other_surroundings(bases, tmp_path, format):
    """A mask of both directions, Dense behind the pooling, a cut, no unit length, RoPE that is stretched."""
    directory = layouts.copy(bases["embedding"], tmp_path / "source")
    layouts.modules(directory, layouts.pooling(), layouts.dense(layouts.WIDTH, 24, use_residual=True))
    yarn(directory)
    layouts.edit(directory, "config.json", is_causal=False)
    layouts.edit(directory, "config_sentence_transformers.json", truncate_dim=20)
    embedder = Embedder.from_pretrained(directory, dtype="float32", device="cpu")
    export(directory, tmp_path / "out", format=format)
    sequences = embedder.tokenizer.embedding(TEXTS, embedder.max_length)
    for [vectors] in GRAPHS[format](tmp_path / "out", ["sentence_embedding"], sequences):
        assert np.abs(vectors - embedder.encode(TEXTS)[: len(vectors)]).max() <= EXPORTED


def llama_cpp(path, *, rank=False, exact=True):
    """llama.cpp's server on a file, with nothing said that the file says; exact: float32 keys and values."""
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path, params.embedding, params.warmup, params.verbosity = str(path), True, False, 0
    params.n_ctx, params.n_batch, params.n_ubatch, params.cpuparams.n_threads = 4096, 1024, 1024, 1
    params.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_UNSPECIFIED
    if rank:  # --reranking, without which the server does not rerank
        params.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    if exact:
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    return x.Server(params)


def llama_vectors(server, texts):
    found = server.handle_embeddings({"input": texts, "model": "x", "encoding_format": "float"})
    return np.array([row["embedding"] for row in found["data"]]), found["usage"]["prompt_tokens"]


@pytest.mark.parametrize("dtype", FORMATS["gguf"].dtypes)
def test_llama_cpp_embeds(exported, embedder, dtype):
    texts = [embedder.query_prompt() + TEXTS[0], *TEXTS, "a turn that ends <|im_end|> and <think> goes on"]
    expected = embedder.encode(texts)
    path = exported("tiny-embedding", "gguf", dtype)
    vectors, tokens = llama_vectors(llama_cpp(path), texts)
    assert tokens == sum(map(len, embedder.tokenizer.embedding(texts, embedder.max_length)))  # EOS once
    if dtype == "float32":
        assert np.abs(vectors - expected).max() <= EXPORTED
    limit = EXPORTED_INT8 if dtype == "int8" else LLAMA_CPP
    assert (1 - (vectors * expected).sum(1)).max() <= limit
    vectors, _ = llama_vectors(llama_cpp(path, exact=False), texts)
    assert (1 - (vectors * expected).sum(1)).max() <= limit


def reranked(server, query, documents):
    """llama.cpp's scores, in the documents' order."""
    found = server.handle_rerank({"query": query, "documents": documents, "model": "x"})
    return np.array([row["relevance_score"] for row in sorted(found["results"], key=lambda row: row["index"])])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", EXPORTED), ("int8", 0.02)])
def test_llama_cpp_reranks(exported, reranker, dtype, limit):
    server = llama_cpp(exported("tiny-reranker", "gguf", dtype), rank=True)
    expected = reranker.predict([(samples.DEMO_QUERY, text) for text in DOCUMENTS])
    assert np.abs(reranked(server, samples.DEMO_QUERY, DOCUMENTS) - expected).max() <= limit


def test_score_heads(bases, tmp_path):
    """Of one label in llama.cpp, of three in ONNX."""
    for labels, format in ((1, "gguf"), (3, "onnx")):
        directory = layouts.copy(bases["reranker"], tmp_path / str(labels))
        layouts.classifier(directory, labels)
        reranker = Reranker.from_pretrained(directory, dtype="float32", device="cpu")
        expected = reranker.predict([(samples.DEMO_QUERY, text) for text in DOCUMENTS])
        out = tmp_path / f"out.{format}"
        export(directory, out, format=format)
        if format == "gguf":
            assert (
                np.abs(reranked(llama_cpp(out, rank=True), samples.DEMO_QUERY, DOCUMENTS) - expected).max() <= EXPORTED
            )
        else:
            for [scores] in onnxruntime(out, ["scores"], sequences_of(reranker)):
                assert np.abs(scores - expected[: len(scores)]).max() <= EXPORTED


@pytest.mark.parametrize("more", [-4, 38])
def test_gguf_has_a_token_for_every_row(tmp_path, more):
    """Of a matrix that lacks the last added tokens, as official ones may, and of a padded one."""
    from gguf import GGUFReader, TokenType

    directory = layouts.base(tmp_path / "source")
    tokens = Embedder.from_pretrained(directory, device="cpu").tokenizer.backend.get_vocab_size()
    rows = tokens + more
    layouts.weights(directory, lambda x: x.update({"embed_tokens.weight": layouts.random(rows, layouts.WIDTH)}))
    layouts.edit(directory, "config.json", vocab_size=rows)
    export(directory, tmp_path / "x.gguf", format="gguf")
    fields = GGUFReader(tmp_path / "x.gguf").fields
    words = fields["tokenizer.ggml.tokens"].contents()
    assert len(words) == rows
    unused = [TokenType(kind) == TokenType.UNUSED for kind in fields["tokenizer.ggml.token_type"].contents()]
    assert sum(unused) == max(0, more)


@pytest.mark.parametrize(("format", "suffix"), [("gguf", ".gguf"), ("onnx", ""), ("openvino", "")])
def test_hashes_of_the_source_are_in_the_file(exported, format, suffix):
    path = exported("tiny-embedding", format)
    if format == "gguf":
        from gguf import GGUFReader

        stored = GGUFReader(path).fields["qwen3core.source_sha256"].contents()
    elif format == "onnx":
        import onnx

        properties = onnx.load(path / "onnx/model.onnx").metadata_props
        stored = {x.key: x.value for x in properties}["qwen3core.source_sha256"]
    else:
        import openvino

        model = openvino.Core().read_model(path / "openvino/openvino_model.xml")
        stored = model.get_rt_info(["qwen3core", "source_sha256"]).value
    names = ["model.safetensors", "tokenizer.json"]
    expected = {name: hashlib.sha256((find("tiny-embedding") / name).read_bytes()).hexdigest() for name in names}
    assert json.loads(stored) == expected


def both_ways(d):
    layouts.edit(d, "config.json", is_causal=False)


def mean(d):
    layouts.modules(d, layouts.pooling("mean"), layouts.NORMALIZE)


def no_prompt(d):
    layouts.modules(d, layouts.pooling(include_prompt=False), layouts.NORMALIZE)


def projected(d):
    layouts.modules(d, layouts.pooling(), layouts.dense(layouts.WIDTH, 24))


def not_normalised(d):
    layouts.modules(d, layouts.pooling())


def cut(d):
    layouts.edit(d, "config_sentence_transformers.json", truncate_dim=16)


def lower(d):
    layouts.edit(d, "sentence_bert_config.json", do_lower_case=True)


def opened(d):
    layouts.closing(d, "<|endoftext|>", opening=["<|im_start|>"])


def closed_twice(d):
    layouts.closing(d, "<|im_end|>", "<|endoftext|>")


def other_words(d):
    layouts.edit(
        d, "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    )


def yarn(d):
    layouts.edit(
        d, "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    )


def labels(d):
    layouts.classifier(d, 3)


REFUSED = [
    (("gguf",), "embedding", both_ways, "gguf: causal: expected True, .* found False"),
    (("gguf", "onnx", "openvino"), "embedding", mean, r"\w+: pooling: expected \('lasttoken',\), .* found \('mean',\)"),
    (("gguf", "onnx"), "embedding", no_prompt, r"\w+: include_prompt: expected True"),
    (("gguf",), "embedding", projected, r"gguf: modules: expected \(\), .* found \(Dense"),
    (("gguf",), "embedding", not_normalised, "gguf: normalize: expected True"),
    (("gguf",), "embedding", cut, "gguf: truncate_dim: expected None, .* found 16"),
    (("gguf",), "embedding", lower, "gguf: lower_case: expected False"),
    (("gguf",), "embedding", opened, "gguf: opening: expected"),
    (("gguf",), "embedding", closed_twice, "gguf: closing: expected one token at most"),
    (("gguf",), "embedding", other_words, "expected BPE that splits texts as Qwen2's does"),
    (("gguf",), "embedding", yarn, "gguf: rope_scaling: expected none"),
    (("gguf",), "reranker", labels, "gguf: labels: expected one, found bad, fair, good"),
    (("gguf", "onnx"), "late interaction", layouts.late_interaction, "expected a checkpoint of the job .* late inter"),
    (("gguf", "onnx"), "embedding", layouts.adapter, "merge the adapter first"),
]


@pytest.mark.parametrize(("formats", "kind", "change", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_what_a_format_cannot_hold_is_refused_by_name(bases, tmp_path, formats, kind, change, message):
    directory = layouts.copy(bases[kind], tmp_path / "source")
    change(directory)
    for format in formats:
        with pytest.raises(InputError, match=message):
            export(directory, tmp_path / f"out.{format}", format=format)
    assert list(tmp_path.iterdir()) == [directory]


def test_weights_beyond_float16_are_refused(bases, tmp_path):
    directory = layouts.copy(bases["embedding"], tmp_path / "source")
    layouts.weights(directory, lambda x: x["layers.0.mlp.up_proj.weight"].__setitem__((0, 0), 1e5))
    for format in ("gguf", "onnx"):
        with pytest.raises(InputError, match=r"weights that are finite in torch\.float16"):
            export(directory, tmp_path / f"out.{format}", format=format, dtype="float16")
        assert not (tmp_path / f"out.{format}").exists()


@pytest.mark.parametrize("format", ["gguf", "openvino"])
def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, format):
    def fail(*_):
        raise OSError("disk full")

    import gguf

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    monkeypatch.setattr(source, "copy_within", fail)
    with pytest.raises(OSError, match="disk full"):
        export("tiny-embedding", tmp_path / "out.gguf", format=format)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-embedding", "--format", "gguf", "-o", "{tmp}/x"], "x: expected a name ending in .gguf, found 'x'"),
        (["tiny-embedding", "--format", "onnx", "-o", "{full}"], "expected a new or an empty directory"),
        (
            ["tiny-embedding", "--format", "openvino", "-o", "{tmp}/x", "--dtype", "int8"],
            "dtype: expected one of float",
        ),
        (["tiny-embedding", "--format", "onnx", "-o", "{tmp}/x", "--dtype", "int4"], "dtype: expected one of float32"),
        (["nowhere", "--format", "gguf", "-o", "{tmp}/x.gguf"], "nowhere: expected a checkpoint directory"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(tmp_path, bases, capsys, arguments, message):
    filled = [argument.format(tmp=tmp_path, full=bases["embedding"]) for argument in arguments]
    assert main(["export", *filled]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_command_writes_a_file_and_names_it(tmp_path, capsys):
    out = tmp_path / "x.gguf"
    assert main(["export", "tiny-reranker", "--format", "gguf", "-o", str(out), "--dtype", "int8"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_package_names_itself(tmp_path, monkeypatch, capsys, format):
    from qwen3core.commands import arguments

    package = FORMATS[format].packages[0]
    module = package.replace("-", "_")
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None if name == module else 1)
    assert main(["export", "tiny-embedding", "--format", format, "-o", str(tmp_path / "x.gguf")]) == 2
    assert capsys.readouterr().err == f"qwen3core: {package} is not installed: pip install {package}\n"


def test_nothing_is_imported_before_a_format_is_written():
    names = ("onnx", "onnx_ir", "onnxruntime", "gguf", "openvino")
    code = f"import sys, qwen3core.export; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


# Readers whose packages do not go with the versions that are tested here, or are none of Python: each is installed
# into a folder of its own.

NO_KERNELS = 'raise ImportError("a kernels package that older transformers do not know")'
SENTENCE_TRANSFORMERS = """
import json, sys, numpy as np
from sentence_transformers import SentenceTransformer
folder, backend, texts, out = sys.argv[1:]
model = SentenceTransformer(folder, backend=backend, device="cpu", local_files_only=True)
np.save(out, model.encode(json.loads(texts)))
"""
BACKENDS = {
    "onnx": [
        *("sentence-transformers==5.2.0", "transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"),
        *("optimum==2.1.0", "optimum-onnx==0.1.0", "datasets==4.4.1"),
    ],
    "openvino": [
        *("transformers==5.5.4", "huggingface_hub==1.5.0", "tokenizers==0.22.2", "optimum==2.3.0"),
        *("optimum-intel==2.2.0", "nncf==3.4.0", "openvino-tokenizers==2026.4.1.0", "tabulate==0.10.0"),
        *("natsort==8.4.0", "pydot==4.0.1", "jstyleson==0.0.2", "httpx==0.28.1", "httpcore==1.0.9"),
        "datasets==4.4.1",
    ],
}
"""What sentence-transformers' backends need: optimum-onnx transformers 4, optimum-intel less than 5.6."""
NODE = """
import { AutoModel, AutoTokenizer, env, pipeline } from "@huggingface/transformers";
const [root, name, dtype, output, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const found = [(await model(tokenizer(JSON.parse(texts), { padding: true })))[output]];
if (output === "sentence_embedding") {
  const extract = await pipeline("feature-extraction", name, { dtype });
  found.push(await extract(JSON.parse(texts), { pooling: "last_token", normalize: true }));
}
console.log(JSON.stringify(found.map((x) => x.tolist())));
"""


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("format", BACKENDS)
def test_sentence_transformers_opens_the_folder(exported, embedder, tmp_path, format):
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, *BACKENDS[format]]
    if (done := subprocess.run(pip, capture_output=True, text=True, timeout=500)).returncode:
        pytest.skip(f"pip cannot install {format}'s reader: {done.stderr[-300:]}")
    (packages / "kernels.py").write_text(NO_KERNELS)
    folder = shutil.copytree(exported("tiny-embedding", format), tmp_path / "model")
    out = tmp_path / "out.npy"
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    texts = [text.strip() for text in TEXTS]  # as sentence-transformers 5 does
    run([sys.executable, "-c", SENTENCE_TRANSFORMERS, folder, format, json.dumps(texts), out], env=environment)
    assert np.abs(np.load(out) - embedder.encode(texts)).max() <= EXPORTED


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory):
    """transformers_js(folder, dtype, output, texts): arrays of a folder's output in Node."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    place = tmp_path_factory.mktemp("node")
    (place / "package.json").write_text('{"type": "module", "private": true}')
    (place / "read.js").write_text(NODE)
    npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "@huggingface/transformers@4.3.1"]
    if (done := subprocess.run(npm, cwd=place, capture_output=True, text=True, timeout=500)).returncode:
        pytest.skip(f"npm cannot install transformers.js: {done.stderr[-300:]}")

    def read(folder, dtype, output, texts):
        out = run(["node", "read.js", folder.parent, folder.name, dtype, output, json.dumps(texts)], cwd=place)
        return [np.array(found) for found in json.loads(out)]

    return read


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [("float32", "fp32"), ("float16", "fp16"), ("int8", "int8")])
def test_transformers_js_embeds(exported, embedder, transformers_js, dtype, name):
    """The vectors of the graph, and those of the pipeline, which pools the last row of a batch."""
    expected = embedder.encode(TEXTS)
    folder = exported("tiny-embedding", "onnx", dtype)
    for vectors in transformers_js(folder, name, "sentence_embedding", TEXTS):
        if dtype == "int8":
            assert (1 - (vectors * expected).sum(1)).max() <= EXPORTED_INT8
        else:
            assert np.abs(vectors - expected).max() <= EXPORTED


@pytest.mark.slow
def test_transformers_js_reranks(exported, reranker, transformers_js):
    pairs = [(samples.DEMO_QUERY, text) for text in DOCUMENTS]
    template = reranker.tokenizer.template
    bodies = [template.fill(reranker.layout.instruction, *pair) for pair in pairs]
    texts = [template.prefix + body + template.suffix for body in bodies]
    [scores] = transformers_js(exported("tiny-reranker", "onnx"), "fp32", "scores", texts)
    assert np.abs(scores[:, 0] - reranker.predict(pairs)).max() <= EXPORTED
