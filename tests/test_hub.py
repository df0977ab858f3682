"""Loading by id from a small Hub on this machine: what is asked for, kept, and said when it fails.

The Hub's client reads its environment once, so models are loaded in processes of their own.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

import tinysteer as ts
from tinysteer.loading.hub import ASSETS, fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "generation_config.json", "model.safetensors"}
NEEDED |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
NOT_NEEDED = {
    "consolidated.safetensors",
    "pytorch_model.bin",
    "README.md",
    "model.gguf",
    "onnx/model.safetensors",
    "onnx/config.json",
}
# What each repository but tiny/model answers: where, status, X-Error-Code, X-Error-Message.
REFUSING = {
    "tiny/gated": ("/resolve/", 403, "GatedRepo", "Access to model tiny/gated is restricted."),
    "tiny/gated-wholly": ("/api/", 401, "GatedRepo", "Access to model tiny/gated is restricted."),
    "tiny/unknown": ("/api/", 404, "RepoNotFound", "Repository not found"),
    "tiny/forbidden": ("/api/", 403, None, None),
    "tiny/bad-token": ("/api/", 401, None, "Invalid credentials in Authorization header"),
    "tiny/disabled": ("/api/", 403, None, "Access to this resource is disabled."),
    "tiny/broken": ("/api/", 500, None, None),
}
LOAD = """
import json, sys
import tinysteer as ts
for source, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["loaded", repr(ts.load(source, revision=revision, device="cpu"))]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def make_handler(files: dict[str, bytes], log: list[tuple[str, str, str]]):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urlsplit(self.path).path
            if "tiny/" in path:  # the client may ask for more than models
                log.append((self.command, path, self.headers.get("Authorization", "")))
            status, body, headers = self.find(path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def find(self, path: str) -> tuple[int, bytes, dict[str, str]]:
            for repo, (where, status, code, message) in REFUSING.items():
                if f"{repo}/" in path and where in path:
                    headers = {"X-Error-Code": code, "X-Error-Message": message}
                    return status, b"", {name: value for name, value in headers.items() if value}
            match path.split("/")[1:]:
                case ["api", "models", _, _, _, "no-such-revision"]:
                    return 404, b"", {"X-Error-Code": "RevisionNotFound"}
                case ["api", "models", owner, name, "revision", _]:
                    siblings = [{"rfilename": file} for file in files]
                    about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                    return 200, json.dumps(about).encode(), {}
                case ["api", "models", _, _, "tree", _]:
                    tree = [
                        {"type": "file", "path": file, "size": len(data), "oid": digest(data)}
                        for file, data in files.items()
                    ]
                    return 200, json.dumps(tree).encode(), {}
                case [_, _, "resolve", _, *file]:
                    data = files["/".join(file)]
                    return 200, data, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT}
            return 404, b"", {}

        def log_message(self, *_): ...

    return Handler


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def start_loading(sources: list, home, endpoint: str, **environment: str) -> subprocess.Popen:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and "PROXY" not in name.upper()
    }
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, json.dumps(sources)],
        env=kept | hub | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes(process: subprocess.Popen, sources: list) -> dict[str, list[str]]:
    """Source -> ["loaded", the model's repr] or [the error's name, its sentence]."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = map(json.loads, out.splitlines())
    names = [f"{source}@{revision}" if revision else source for source, revision in sources]
    return dict(zip(names, lines, strict=True))


ONLINE = [["tiny/model", None], ["tiny/model", "no-such-revision"], ["too/many/parts", None]]
ONLINE += [[repo, None] for repo in REFUSING]
LATER = [["tiny/model", None], ["tiny/never-seen", None], ["tiny/half", None]]


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Every source loaded once with the Hub there, then again with it gone, then offline."""
    files = {path.name: path.read_bytes() for path in (ASSETS / "tiny-instruct").iterdir()}
    files |= {"chat_template.jinja": b"{{ messages[0].content }}", "generation_config.json": b"{}"}
    files |= dict.fromkeys(NOT_NEEDED, b"something else")
    log = []
    home = tmp_path_factory.mktemp("hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(files, log))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        there = start_loading(ONLINE, home, endpoint, HF_TOKEN="hf_secret")
        there = outcomes(there, ONLINE)
    finally:
        server.shutdown()
        server.server_close()
    half = home / "hub" / "models--tiny--half"  # as a download that was stopped leaves it
    (half / "refs").mkdir(parents=True)
    (half / "refs" / "main").write_text(COMMIT)
    (half / "snapshots" / COMMIT).mkdir(parents=True)
    (half / "snapshots" / COMMIT / "config.json").write_bytes(files["config.json"])
    gone = start_loading(LATER, home, endpoint)
    offline = start_loading(LATER, home, endpoint, HF_HUB_OFFLINE="1")
    return {
        "there": there,
        "gone": outcomes(gone, LATER),
        "offline": outcomes(offline, LATER),
        "log": log,
        "home": home,
    }


def test_a_model_is_loaded_by_its_id(visit):
    assert visit["there"]["tiny/model"] == [
        "loaded",
        "<tiny/model: llama, 6 layers of width 128, bfloat16>",
    ]


def test_only_the_needed_files_are_downloaded(visit):
    paths = [path for _, path, _ in visit["log"] if path.startswith("/tiny/model/resolve/")]
    assert {path.split(f"/{COMMIT}/")[1] for path in paths} == NEEDED
    (snapshot,) = visit["home"].glob("hub/models--tiny--model/snapshots/*")
    assert {path.name for path in snapshot.rglob("*")} == NEEDED


def test_a_token_is_sent_as_the_hub_wants_it(visit):
    assert {authorization for _, _, authorization in visit["log"]} == {"Bearer hf_secret"}


@pytest.mark.parametrize("hub", ["gone", "offline"])
def test_the_second_load_needs_no_hub(visit, hub):
    assert visit[hub]["tiny/model"] == visit["there"]["tiny/model"]


@pytest.mark.parametrize("hub", ["gone", "offline"])
def test_without_a_hub_what_was_never_loaded_is_missed(visit, hub):
    error, sentence = visit[hub]["tiny/never-seen"]
    assert error == "ConnectionError"
    assert sentence.startswith(
        "there is no folder tiny/never-seen, and the Hub's cache here does not hold all of "
        "tiny/never-seen, and the Hub cannot be reached: connect, or pass the folder of a model ("
    )


@pytest.mark.parametrize("hub", ["gone", "offline"])
def test_without_a_hub_half_a_model_is_not_taken_for_all_of_it(visit, hub):
    error, sentence = visit[hub]["tiny/half"]
    assert error == "ConnectionError"
    assert "the Hub's cache here does not hold all of tiny/" in sentence
    assert "and the Hub cannot be reached: connect, or pass the folder of a model (" in sentence


WHOLE = ("config.json", "tokenizer.json", "model.safetensors")
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = json.dumps({"weight_map": dict(zip("abc", SHARDS, strict=True))})
# What the cache holds -> what the sentence names, or None where nothing is lacking.
CACHED = {
    "everything": (WHOLE, None),
    "everything in shards": ((*WHOLE[:2], "model.safetensors.index.json", *SHARDS), None),
    "no configuration": (WHOLE[1:], "config.json"),
    "no tokenizer": (WHOLE[::2], "tokenizer.json"),
    "no weights": (WHOLE[:2], "model.safetensors"),
    "no shard but one": ((*WHOLE[:2], "model.safetensors.index.json", SHARDS[1]), SHARDS[::2]),
    "nothing": ((), WHOLE),
}


def cached(folder, what: str, monkeypatch):
    """What the cache holds of a model, as snapshot_download returns it -> what is lacking."""
    names, lacking = CACHED[what]
    for name in names:
        (folder / name).write_text(INDEX)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    return [lacking] if isinstance(lacking, str) else [*(lacking or ())]


@pytest.mark.parametrize("what", CACHED)
def test_what_the_cache_lacks_is_named_where_the_hub_is_away(what, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OfflineModeIsEnabled("offline")

    lacking = cached(tmp_path, what, monkeypatch)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    if not lacking:
        assert fetch("tiny/model") == tmp_path
        return
    with pytest.raises(ConnectionError) as caught:
        fetch("tiny/model")
    assert f"does not hold all of tiny/model (it lacks {', '.join(lacking)}), and the Hub" in str(
        caught.value
    )


def test_what_the_hub_itself_lacks_is_left_to_those_who_read_it(tmp_path, monkeypatch):
    cached(tmp_path, "no weights", monkeypatch)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert fetch("tiny/model") == tmp_path


def test_who_wants_no_weights_misses_none(tmp_path, monkeypatch):
    cached(tmp_path, "no weights", monkeypatch)
    assert fetch("tiny/model", weights=False) == tmp_path


SAID = {
    "tiny/gated": (
        "PermissionError",
        "tiny/gated is gated: accept its terms at https://huggingface.co/tiny/gated, then set "
        "HF_TOKEN to a token of that account or run `hf auth login`",
    ),
    "tiny/unknown": (
        "FileNotFoundError",
        "there is no folder tiny/unknown, and the Hugging Face Hub has no tiny/unknown "
        "(where it is private, set HF_TOKEN to a token that may read it)",
    ),
    "tiny/forbidden": (
        "PermissionError",
        "the Hub refuses tiny/forbidden to you (HTTP 403): check the token in HF_TOKEN or log in "
        "anew with `hf auth login`",
    ),
    "tiny/broken": (
        "ConnectionError",
        "there is no folder tiny/broken, and the Hub's cache here does not hold all of "
        "tiny/broken, and the Hub cannot be reached: connect, or pass the folder of a model (500)",
    ),
    "tiny/model@no-such-revision": (
        "FileNotFoundError",
        "tiny/model has no revision 'no-such-revision' on the Hub",
    ),
    "too/many/parts": (
        "FileNotFoundError",
        "there is no folder too/many/parts, and it is no Hugging Face Hub id (owner/name) either",
    ),
}
ALIKE = {
    "tiny/gated-wholly": "tiny/gated",
    "tiny/bad-token": "tiny/forbidden",
    "tiny/disabled": "tiny/forbidden",
}


@pytest.mark.parametrize("source", [*SAID, *ALIKE])
def test_what_is_wrong_is_said_in_one_sentence(visit, source):
    like = ALIKE.get(source, source)
    error, sentence = SAID[like]
    sentence = sentence.replace(like, source).replace("403", "401" if "token" in source else "403")
    assert visit["there"][source] == [error, sentence]


ERRORS = {
    "the disk is full": (OSError(errno.ENOSPC, "No space left"), OSError, "No space left"),
    "the cache is another's": (PermissionError(errno.EACCES, "No"), PermissionError, "No$"),
    "a proxy is wrong": (HTTPError("proxy"), ConnectionError, r"cannot be reached: .*\(HTTPErr"),
    "the line is cut": (
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ConnectionError,
        r"cannot be reached: connect, or pass the folder of a model \(ConnectionResetError\)",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_the_disk_is_not_taken_for_the_network(what, monkeypatch):
    happened, error, sentence = ERRORS[what]

    def fail(*_, **__):
        raise happened

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(error, match=sentence):
        fetch("tiny/model")


def test_a_folder_has_no_revisions():
    folder = ASSETS / "tiny-instruct"
    with pytest.raises(ValueError, match=r"revision='main' is for Hub ids; .* is a folder"):
        ts.load(folder, revision="main")


def test_a_path_that_is_not_there_is_not_sought_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere, and it is no Hug"):
        ts.load(tmp_path / "nowhere")


def test_shards_of_any_name_are_fetched_by_their_index(tmp_path, monkeypatch):
    asked = []

    def download(*_, allow_patterns, **__):
        asked.append(allow_patterns)
        return str(tmp_path)

    for name in (*WHOLE[:2], "b.safetensors", "part/a.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    index = {"weight_map": {"x": "part/a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("tiny/model") == tmp_path
    assert "model.safetensors.index.json" in asked[0]
    assert asked[1:] == [["b.safetensors", "part/a.safetensors"]]


NO_MODEL = {
    "a model is a folder, a Hub id or one of .*, not None": (None, None),
    "a model is a folder, a Hub id or one of .*, not ''": ("", None),
    "a model is a folder, a Hub id or one of .*, not 5": (5, None),
    "revision is ''; it must be a branch, tag or commit": ("owner/name", ""),
    "revision is 3; it must be a branch": ("owner/name", 3),
    r"config\.json is a file: give the folder that holds it": (
        ASSETS / "tiny-base/config.json",
        None,
    ),
}


@pytest.mark.parametrize("sentence", NO_MODEL)
def test_what_is_handed_in_as_a_model_and_is_not_one_is_refused(sentence):
    source, revision = NO_MODEL[sentence]
    with pytest.raises(ValueError, match=sentence):
        ts.load(source, revision=revision)


def test_a_package_in_a_zip_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("tinysteer.loading.hub.ASSETS", tmp_path / "tinysteer.zip/assets")
    with pytest.raises(FileNotFoundError, match="is not there: install the package unzipped"):
        ts.load()
