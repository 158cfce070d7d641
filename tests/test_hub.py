"""Hub ids: the local cache first, else a download; tried against a small hub on this machine's loopback."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tolerances import SAME_TEXT_FP32

from qwen3core import Embedder

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of a hub that snapshot_download makes: revision info, file listing, file."""

    protocol_version = "HTTP/1.1"

    def __init__(self, directory, log, *args):
        self.directory, self.log = directory, log
        super().__init__(*args)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.log.append(path)
        files = sorted(p for p in self.directory.rglob("*") if p.is_file())
        names = [str(p.relative_to(self.directory)) for p in files]
        if path.startswith("/api/models/owner/model/tree/"):
            return self.answer([self.entry(name) for name in names])
        if path.startswith("/api/models/owner/model"):
            return self.answer({"id": "owner/model", "sha": REVISION, "siblings": [{"rfilename": n} for n in names]})
        name = path.split(f"/resolve/{REVISION}/")[-1]
        if name not in names:
            return self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer((self.directory / name).read_bytes())

    do_HEAD = do_GET

    def entry(self, name):
        data = (self.directory / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        etag = hashlib.sha1(body).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(embedding_dir, tmp_path):
    log: list[str] = []
    directory = shutil.copytree(embedding_dir, tmp_path / "served")
    (directory / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", log
    server.shutdown()
    server.server_close()


def embed(tmp_path, endpoint, *code, **environment):
    """Embed one word by hub id in a fresh process, on the CPU, with a cache under tmp_path."""
    script = (
        "import sys\nfrom qwen3core import Embedder, CheckpointError\n"
        "try: print(float(Embedder.from_pretrained(*eval(sys.argv[1]), dtype='float32').encode('gravity').sum()))\n"
        "except CheckpointError as error: print('CheckpointError:', error)"
    )
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "CUDA_VISIBLE_DEVICES": ""}
    env = {k: v for k, v in os.environ.items() if k.lower() not in {"http_proxy", "https_proxy", "all_proxy"}}
    command = [sys.executable, "-c", script, *(code or ["('owner/model',)"])]
    run = subprocess.run(command, env=env | settings | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_download_then_cache(tmp_path, hub, embedding_dir):
    endpoint, log = hub
    vector = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu").encode("gravity")
    # A fresh process may run on another number of threads; the sum adds up as many errors as there are components.
    expected = pytest.approx(float(vector.sum()), abs=len(vector) * SAME_TEXT_FP32)
    assert float(embed(tmp_path, endpoint)) == expected
    for name in ("model.safetensors", "chat_template.jinja"):
        assert any(path.endswith(name) for path in log)
    assert not any(path.endswith("merges.txt") for path in log)  # only what is read

    log.clear()
    assert float(embed(tmp_path, endpoint)) == expected
    assert float(embed(tmp_path, endpoint, HF_HUB_OFFLINE="1")) == expected
    assert log == []  # the cache answered, the hub was not asked

    # A cache with a file missing is completed.
    snapshot = next(Path(tmp_path / "hf").rglob("snapshots")) / REVISION
    (snapshot / "model.safetensors").unlink()
    assert embed(tmp_path, endpoint, HF_HUB_OFFLINE="1").startswith("CheckpointError: ")
    assert float(embed(tmp_path, endpoint)) == expected


@pytest.mark.parametrize(
    ("name", "endpoint", "environment", "message"),
    [
        ("owner/absent", None, {}, "owner/absent: expected a local directory"),
        pytest.param(
            *("owner/model", None, {"HF_HUB_OFFLINE": "1"}, "owner/model: expected a local directory, a cached"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("owner/model", "http://127.0.0.1:9", {}, "owner/model: expected a local directory, a cached"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["absent", "offline", "unreachable"],
)
def test_what_cannot_be_had_is_named(tmp_path, hub, name, endpoint, environment, message):
    out = embed(tmp_path, endpoint or hub[0], f"({name!r},)", **environment)
    assert out.startswith("CheckpointError: ")
    assert message in out
    assert "found none" in out
