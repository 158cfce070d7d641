"""Corpora to shards: every row once, with its id, whoever is killed when; and what is refused.

The test of kills starts this file as a program, which imports everything once and forks a process per run.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from checkpoint_files import tiny
from conftest import ROOT
from limits import full_disk
from tolerances import SAME_TEXT_FP32

from qwen3core import Embedder, InputError, products, samples, stream
from qwen3core.commands import main
from qwen3core.corpora import Embed, embed_corpus, read_blocks
from qwen3core.corpora.shards import MANIFEST

WORDS = ["gold", "bread", "chess", "owl", "rain", "metal", "food", "violin"]
EMBED = ["--rows-per-shard", "8", "--ops", "reference"]
"""The default's first call compares sizes of products, which takes minutes with weights as small as these."""


def rows_of(count, seed=0):
    chance = random.Random(seed)
    return [{"id": f"d{n}", "text": " ".join(chance.choices(WORDS, k=chance.randint(0, 40)))} for n in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("corpora") / "model")


@pytest.fixture(scope="module")
def stage(model):
    return Embed(model, ops="reference")


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", rows_of(43))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder):
    """Ids, and vectors [n, dim]."""
    table = pq.read_table(folder)
    return table["id"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


def embed(capsys, *arguments):
    status = main(["embed", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_every_row_comes_out_once_with_its_id(model, corpus, tmp_path, capsys):
    status, out, _ = embed(capsys, model, corpus, "-o", f"{tmp_path}/out/", *EMBED)
    assert status == 0
    assert out == "6 of 6 shards, 43 texts; 6 of the shards were written now\n"
    ids, vectors = read(tmp_path / "out")
    rows = rows_of(43)
    assert ids == [row["id"] for row in rows]
    embedder = Embedder.from_pretrained(model, ops="reference")
    blocks = stream(embedder.encode_document, (row["text"] for row in rows), block_size=8)
    np.testing.assert_array_equal(vectors, np.concatenate(list(blocks)))
    assert sorted(files(tmp_path / "out")) == [MANIFEST, *(f"part-0000{n}.parquet" for n in range(6))]
    assert [len(pq.read_table(path)) for path in sorted((tmp_path / "out").glob("part-*"))] == [8] * 5 + [3]
    assert embed(capsys, model, corpus, "-o", tmp_path / "out", *EMBED)[1].endswith(
        "; 0 of the shards were written now\n"
    )


def test_options_are_those_of_one_file(model, corpus, tmp_path, capsys):
    options = ["--instruction", "Find it", "--dim", "4", "--max-length", "30"]
    assert embed(capsys, model, corpus, "-o", f"{tmp_path}/out/", *EMBED, *options)[0] == 0
    assert embed(capsys, model, corpus, "-o", tmp_path / "out.npy", *options, *EMBED[2:])[0] == 0
    vectors = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(read(tmp_path / "out")[1], vectors, atol=SAME_TEXT_FP32)


def test_formats_and_urls_give_the_same(stage, tmp_path):
    """Rows of several files are one corpus; without an id, the row's number in it is one."""
    texts = [row["text"] or "nothing" for row in rows_of(30)]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "\r\n".join(texts[:11]) + "\r\n").encode())
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts[11:]])
    pq.write_table(pyarrow.table({"other": [0] * 30, "text": texts}), tmp_path / "c.parquet", row_group_size=7)
    fsspec.filesystem("memory").pipe("/corpus.txt", "\n".join(texts).encode())
    sources = [[f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"], [f"{tmp_path}/c.parquet"], ["memory://corpus.txt"]]
    sources.append([f"file://{tmp_path}/a.txt", f"file://{tmp_path}/b.jsonl"])
    for n, inputs in enumerate(sources):
        embed_corpus(stage, inputs, tmp_path / str(n), rows_per_shard=8)
        ids, vectors = read(tmp_path / str(n))
        assert ids == [str(number) for number in range(30)]
        np.testing.assert_allclose(vectors, stage.encode(texts), atol=SAME_TEXT_FP32)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_passed_over_is_not_parsed(tmp_path, ending):
    if ending == "jsonl":
        path = tmp_path / "x.jsonl"
        path.write_text('{"text": "one", "id": 7}\n\n{oops\n{"text": 3}\n{"text": "last", "id": "x"}\n')
    else:
        path = tmp_path / "x.parquet"
        pq.write_table(pyarrow.table({"text": ["one", None, None, "last"], "id": ["7", None, "b", "x"]}), path)
    blocks = list(read_blocks([str(path)], 1))
    assert blocks[0].columns() == {"id": ["7"], "text": ["one"]}
    assert blocks[3].columns() == {"id": ["x"], "text": ["last"]}
    for number, at in ((1, "line 3: expected JSON"), (2, "line 4: expected a text")):
        found = at if ending == "jsonl" else f"row {number + 1}: expected a text"
        with pytest.raises(InputError, match=f"{path.name}, {found}"):
            blocks[number].columns()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "text": "a"}, {"text": "b"}], "line 2: expected an id, text or integer, as the first row has"),
        ([{"id": 1, "text": "a"}, {"id": [2], "text": "b"}], "line 2: expected an id, text or integer"),
        ([{"text": "a"}, {"id": 1, "text": "b"}], "line 2: expected no id, as in the first row, found 1"),
        (["a", {"id": 1}], "line 2: expected a text, or an object with a text 'text', found"),
    ],
)
def test_rows_that_are_no_corpus_are_named(tmp_path, rows, message):
    [block] = read_blocks([str(write_jsonl(tmp_path / "x.jsonl", rows))], 8)
    with pytest.raises(InputError, match=message):
        block.columns()


def test_processes_share_the_work(model, corpus, tmp_path, capsys, monkeypatch):
    """By number, by torchrun's or Slurm's environment; together the bytes of one, and a lost one's are made up for."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    embed(capsys, model, corpus, "-o", f"{whole}/", *EMBED)
    call = [model, corpus, "-o", f"{shared}/", *EMBED, "--shard"]
    assert embed(capsys, *call, "2/3")[1] == "2 of 6 shards, 16 texts; 2 of the shards were written now\n"
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        with monkeypatch.context() as patch:
            for name, value in zip(names, ("0", "3"), strict=True):
                patch.setenv(name, value)
            assert embed(capsys, *call, "env")[1].startswith("2 of 6 shards, 16 texts; ")
    assert sorted(files(shared)) == [MANIFEST, *(f"part-0000{n}.parquet" for n in (0, 1, 3, 4))]
    embed(capsys, *call, "1/1")
    assert files(shared) == files(whole)
    for value, found in (
        ("0/3", "'0/3'"),
        ("4/3", "'4/3'"),
        ("x", "'x'"),
        ("env", "'SLURM_PROCID and SLURM_NTASKS /'"),
    ):
        with pytest.raises(SystemExit):
            main(["embed", *map(str, call), value])
        assert f"expected K/N with K from 1 to N, or env, found {found}" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_them(model, corpus, tmp_path):
    call = ["embed", str(model), str(corpus), *EMBED, "-o"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qwen3core"]
    program_output([*torchrun, *call, f"{tmp_path}/shared/", "--shard", "env"])
    assert main([*call, f"{tmp_path}/whole/"]) == 0
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


def test_another_run_is_refused_by_name(model, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    call = [model, corpus, "-o", f"{out}/"]
    assert embed(capsys, *call, *EMBED)[0] == 0
    before = files(out)
    other = tiny(tmp_path / "other", tied=False)
    for changed, name in (
        ([*call, *EMBED, "--dim", "4"], "dim None, here 4"),
        ([*call, *EMBED, "--query"], "query False, here True"),
        ([*call, *EMBED, "--dtype", "bfloat16"], "dtype 'float32', here 'bfloat16'"),
        ([*call, *EMBED, "--rows-per-shard", "9"], "rows_per_shard 8, here 9"),
        ([*call, *EMBED, "--ops", "torch"], "ops 'reference', here 'torch'"),
        ([other, *call[1:], *EMBED], "checkpoint '"),
        ([model, corpus, corpus, *call[2:], *EMBED], "inputs [{"),
    ):
        status, _, said = embed(capsys, *changed)
        assert (status, said.count("\n")) == (2, 1)
        assert f"{MANIFEST}: expected this run, found one of {name}" in said
    with corpus.open("a") as file:
        file.write('{"id": "new", "text": "x"}\n')
    assert "expected this run, found one of inputs [{" in embed(capsys, *call, *EMBED)[2]
    assert files(out) == before
    (out / MANIFEST).write_text("[")
    assert f"{MANIFEST}: expected what a run writes, found something else" in embed(capsys, *call, *EMBED)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{corpus}", "-o", "{foreign}"], "expected an empty directory, or a run to go on with, found mine.txt"),
        (
            ["-", "-o", "{new}/"],
            "-: expected files or URLs, which can be read again after a kill, found standard input",
        ),
        (["a text", "-o", "{new}/"], "No such file or directory: 'a text'"),
        (
            ["{corpus}", "-o", "{new}/", "--text", "x"],
            "expected files or URLs for an output that is a folder, found --text",
        ),
        (["-o", "{new}/"], "expected files or URLs for an output that is a folder, found no INPUT"),
        (["nowhere://x.txt", "-o", "{new}/"], "nowhere://x.txt: expected a URL that can be read here, found "),
        (
            ["{corpus}", "-o", "{new}/", "--rows-per-shard", "0"],
            "rows_per_shard: expected an integer of at least 1, found 0",
        ),
        (
            ["{corpus}", "-o", "{new}.npy", "--rows-per-shard", "8"],
            "rows_per_shard: expected with an output that is a folder",
        ),
        (
            ["{corpus}", "-o", "{new}.npy", "--shard", "1/2"],
            "shard: expected with an output that is a folder alone, found",
        ),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(model, corpus, tmp_path, capsys, arguments, message):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    places = {"corpus": corpus, "foreign": foreign, "new": tmp_path / "new"}
    status, out, said = embed(capsys, model, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["corpus.jsonl", "foreign", "mine.txt"]


def test_a_missing_package_says_its_name(model, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert embed(capsys, model, corpus, "-o", f"{tmp_path}/out/")[2] == (
        "qwen3core: pyarrow is not installed: pip install pyarrow\n"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    pq.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "x.parquet")
    assert "x.parquet: pyarrow is not installed: pip install pyarrow" in embed(capsys, model, tmp_path / "x.parquet")[2]


def test_parquet_is_read_by_embed_and_rerank_to_a_file(model, tmp_path, capsys):
    pq.write_table(pyarrow.table({"text": ["gold", "bread"], "n": [1, 2]}), tmp_path / "x.parquet")
    _, out, _ = embed(capsys, model, tmp_path / "x.parquet", f"file://{tmp_path}/x.parquet")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["gold", "bread"] * 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "broken.parquet: expected a Parquet file, found " in embed(capsys, model, tmp_path / "broken.parquet")[2]


def test_a_full_disk_is_said_and_gone_on_from(model, corpus, tmp_path, capsys):
    """The third shard has no place; the first two are whole."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    rows = rows_of(43)
    rows[20]["id"] = "x" * 30_000
    write_jsonl(corpus, rows)
    embed(capsys, model, corpus, "-o", f"{whole}/", *EMBED)
    with full_disk(20_000):
        status, _, said = embed(capsys, model, corpus, "-o", f"{out}/", *EMBED)
    assert status == 2
    assert said.splitlines()[-1].startswith(f"qwen3core: {out}: expected to write files there, found ")
    assert [*files(out)] == [MANIFEST, "part-00000.parquet", "part-00001.parquet"]
    assert not list(out.glob(".*"))
    assert embed(capsys, model, corpus, "-o", out, *EMBED)[0] == 0
    assert files(out) == files(whole)


def test_a_row_that_fails_is_named(stage, tmp_path):
    rows = [{"text": "gold"}] * 9 + [{"text": " " * 5_000_001}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=r"line 10: expected at most 5000000 white spaces"):
        embed_corpus(stage, [str(path)], tmp_path / "out", rows_per_shard=4)
    stage = Embed(tiny(tmp_path / "model"), batch_tokens=3, ops="reference")
    (tmp_path / "y.txt").write_text("a\nb\ngold and bread and rain\n")
    with pytest.raises(InputError, match=r"rows from .*y.txt, line 3 on: batch_tokens: expected at least"):
        embed_corpus(stage, [str(tmp_path / "y.txt")], tmp_path / "out-2", rows_per_shard=2)
    assert [*files(tmp_path / "out-2")] == [MANIFEST, "part-00000.parquet"]


def test_a_number_beyond_the_processes_is_refused(stage, corpus, tmp_path):
    with pytest.raises(InputError, match="shard: its number: expected an integer from 1 to 3, found 0"):
        embed_corpus(stage, [str(corpus)], tmp_path / "out", shard=(0, 3))


def test_one_process_of_a_number_at_a_time(model, stage, corpus, tmp_path):
    class Second(Embed):
        def __call__(self, batch):
            with pytest.raises(InputError, match="expected no other run there, found one that is running"):
                embed_corpus(stage, [str(corpus)], tmp_path / "out", rows_per_shard=8)
            raise StopIteration

    with pytest.raises(StopIteration):
        embed_corpus(Second(model, ops="reference"), [str(corpus)], tmp_path / "out", rows_per_shard=8)
    assert embed_corpus(stage, [str(corpus)], tmp_path / "out", rows_per_shard=8)["written"] == 6


def test_a_vector_does_not_depend_on_what_was_computed_before(monkeypatch):
    """As ``Ops.torch``'s do, whose products differ by the numbers of rows that the process has met."""
    texts = [" ".join(WORDS * (n % 7 + 1))[: 11 * n + 5] for n in range(20)]
    found = {}
    for ops in ("torch", None):
        stage = Embed("tiny-embedding", ops=ops, device="cpu", dtype="float32")
        for before in ((), [WORDS[0] * n for n in range(1, 60, 5)]):
            monkeypatch.setattr(products, "MET", set())
            for text in before:
                stage.encode([text])
            found[ops, len(before)] = stage.encode(texts)
    np.testing.assert_array_equal(found[None, 0], found[None, 12])
    assert (found["torch", 0] != found["torch", 12]).any()


GROWTH = """
import json, sys
from pathlib import Path
import numpy
from qwen3core.corpora import embed_corpus

def mebibytes():
    return int(next(x for x in Path("/proc/self/status").open() if x.startswith("VmRSS")).split()[1]) / 1024
class Stage:
    seen = []
    def identity(self):
        return {}
    def __call__(self, batch):
        self.seen.append(mebibytes())
        return {"id": batch["id"], "embedding": numpy.ones((len(batch["id"]), 256), numpy.float32)}
embed_corpus(Stage(), [sys.argv[1]], sys.argv[2], rows_per_shard=500)
print(json.dumps(Stage.seen))
"""


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, ending):
    """60 MB of texts; a shard is 1.5 MB of them."""
    path, texts = tmp_path / f"x.{ending}", ["x" * 3000 + str(n) for n in range(20_000)]
    if ending == "jsonl":
        write_jsonl(path, [{"text": text} for text in texts])
    else:
        pq.write_table(pyarrow.table({"text": texts}), path, row_group_size=2000, compression="none")
    seen = json.loads(program_output(["-c", GROWTH, str(path), str(tmp_path / "out")]))
    assert len(seen) == 40
    assert max(seen[-10:]) < max(seen[5:15]) + 10, seen


def program_output(arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return "".join(done.stdout.splitlines()[-1:])


def test_the_recipe_of_a_search(tmp_path, monkeypatch, capsys):
    """On the small checkpoints, from the corpus to the best three."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("corpus.jsonl"), [{"id": f"d{n}", "text": text} for n, text in enumerate(samples.DEMO_DOCUMENTS)])
    assert main(["embed", "tiny-embedding", "corpus.jsonl", "-o", "vectors/", *EMBED]) == 0
    capsys.readouterr()
    recipe = (ROOT / "tests" / "recipes" / "search.py").read_text("utf-8")
    for official in ("Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Reranker-0.6B"):
        assert official in recipe
    recipe = recipe.replace("Qwen/Qwen3-Embedding-0.6B", "tiny-embedding")
    exec(compile(recipe.replace("Qwen/Qwen3-Reranker-0.6B", "tiny-reranker"), "search.py", "exec"), {})
    hits = capsys.readouterr().out.splitlines()
    assert len(hits) == 3
    assert all("violin" in hit or "guitar" in hit for hit in hits[:2])


RAY = """
import json, os, signal, sys, threading, time
from pathlib import Path
import numpy, ray
from qwen3core.corpora import Embed

out, model, seen = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

class Slow(Embed):
    def __call__(self, batch):
        (seen / f"{batch['id'][0]}-{os.getpid()}").touch()
        time.sleep(0.3)  # so that a kill comes half-way
        return super().__call__(batch)

killed = []
def kill():
    while len(list(seen.iterdir())) < 6:
        time.sleep(0.01)
    killed.append(int(next(seen.iterdir()).name.partition("-")[2]))
    os.kill(killed[0], signal.SIGKILL)

env = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}}
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=env)
rows = ray.data.read_json(sys.argv[4], file_extensions=None)
thread = threading.Thread(target=kill)
thread.start()
options = {"ops": "reference"}
pool = ray.data.ActorPoolStrategy(size=2)
embedded = rows.map_batches(
    Slow, fn_constructor_args=[model], fn_constructor_kwargs=options, compute=pool, batch_size=8
)
embedded.write_parquet(str(out))
thread.join()
workers = {int(path.name.partition("-")[2]) for path in seen.iterdir()}
(out.parent / "found.json").write_text(json.dumps({"killed": killed, "workers": len(workers)}))
"""


@pytest.mark.slow
def test_ray_data_takes_the_stage_and_loses_nothing_with_a_worker(model, tmp_path):
    """Two workers, one of them killed half-way: every row once, with the vectors of the command."""
    pytest.importorskip("ray")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows_of(200))
    (tmp_path / "seen").mkdir()
    paths = [str(tmp_path / name) for name in ("out", "model", "seen", "corpus.jsonl")]
    paths[1] = str(model)
    program_output(["-c", RAY, *paths])
    found = json.loads((tmp_path / "found.json").read_text())  # Ray writes to standard output, to the last
    assert len(found["killed"]) == 1
    assert found["workers"] >= 3  # two, and the one in the place of the killed
    embed_corpus(Embed(model, ops="reference"), [str(corpus)], tmp_path / "expected", rows_per_shard=8)
    tables = [pq.read_table(path) for path in (tmp_path / "out").glob("*.parquet")]
    vectors = {key: value for table in tables for key, value in zip(*map(listed, table.columns), strict=True)}
    assert sum(map(len, tables)) == len(vectors) == 200
    for key, vector in zip(*read(tmp_path / "expected"), strict=True):
        np.testing.assert_allclose(vectors[key], vector, atol=SAME_TEXT_FP32)


def listed(column):
    return column.to_pylist()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, kills):
    """Three times with little work, twenty times as it is by default."""
    found = json.loads(program_output([__file__, str(tmp_path), str(kills)]))
    assert found["kills"] == kills
    assert found["begun"] > 0, found  # some shards were there, and some were not
    assert kills < 20 or found["writing"] > 0, found


def start(call, errors):
    """Fork a process that runs the command; its number."""
    pid = os.fork()
    if pid == 0:
        with errors.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(None):
            status = main(call)
        os._exit(status)
    return pid


def due(aim, out, wanted, until):
    """Whether to kill: at a moment, once there are so many shards, or then while one is written."""
    if aim == "time":
        return time.monotonic() >= until
    enough = aim != "none" and len([*out.glob("part-*")]) >= wanted
    return enough and (aim == "shards" or any(out.glob(".1-of-1/part/*")))


def program(folder, kills, seed=0):
    """Run once undisturbed, then with kills, each folder to its end; print what was seen."""
    chance = random.Random(seed)
    corpus = write_jsonl(folder / "corpus.jsonl", rows_of(240))
    if kills > 3:
        model, options = "tiny-embedding", EMBED[:2]
        Embed(model).encode(["gold"])  # compares sizes of products once, for all processes
    else:
        model, options = str(tiny(folder / "model")), EMBED

    def call(out):
        return ["embed", model, str(corpus), "-o", f"{out}/", *options]

    began = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(start(call(folder / "whole"), folder / "errors"), 0)[1])
    seconds, whole = time.monotonic() - began, files(folder / "whole")
    assert status == 0, (folder / "errors").read_text()
    assert len(whole) == 31
    found, number, runs = {"kills": 0, "begun": 0, "writing": 0}, 0, 0
    while found["kills"] < kills or number == 0:
        out = folder / f"killed-{number}"
        aim = ("shards", "time", "writing")[runs % 3] if found["kills"] < kills else "none"
        runs += 1
        wanted = chance.randint(min(28, len([*out.glob("part-*")]) + 1), 29)
        pid, until = start(call(out), folder / "errors"), time.monotonic() + chance.uniform(0, seconds)
        ended = 0
        while not ended and not due(aim, out, wanted, until):
            time.sleep(0.0005)
            ended = os.waitpid(pid, os.WNOHANG)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
            ended = os.WIFEXITED(os.waitpid(pid, 0)[1])
            found["kills"] += not ended
            found["writing"] += any(out.glob(".1-of-1/part/*"))
        there = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
        assert there.items() <= whole.items()
        found["begun"] += not ended and 1 < len(there) < len(whole)
        if ended:
            assert files(out) == whole, (folder / "errors").read_text()
            assert not [*out.glob(".*")]
            number += 1
    print(json.dumps(found))


if __name__ == "__main__":
    program(Path(sys.argv[1]), *map(int, sys.argv[2:]))
