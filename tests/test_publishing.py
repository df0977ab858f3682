"""Publishing a vector and loading it again, through a small Hub on this machine; its card."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch

import tinysteer as ts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TALK = """
import sys
import tinysteer as ts

vector = ts.SteeringVector.load(sys.argv[1])
for act in (
    lambda: print(vector.push_to_hub("me/terse")),
    lambda: print(ts.SteeringVector.from_hub("me/terse") == vector),
    lambda: print(ts.SteeringVector.from_hub("me/terse").metadata == vector.metadata),
    lambda: vector.push_to_hub("other/terse"),
    lambda: vector.push_to_hub("no id at all"),
    lambda: vector.push_to_hub("terse"),
    lambda: ts.SteeringVector.from_hub("me/nothing"),
    lambda: ts.SteeringVector.from_hub("me/empty"),
):
    try:
        act()
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
"""


class Hub(BaseHTTPRequestHandler):
    """Enough of the Hub for one user, `me`: repositories are made, written and read."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]
    asked: list[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        match urlsplit(self.path).path.split("/")[1:]:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                if not repo.startswith("me/"):
                    return self.answer(403, {"error": "not yours"})
                self.repos.setdefault(repo, {})
                return self.answer(
                    200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo}
                )
            case ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                return self.answer(200, {"files": modes})
            case ["api", "models", owner, name, "commit", _]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.repos[f"{owner}/{name}"][line["value"]["path"]] = content
                url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{COMMIT}"
                return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer(404, {})

    def do_GET(self):
        match urlsplit(self.path).path.split("/")[1:]:
            case ["api", "whoami-v2"]:
                return self.answer(200, {"type": "user", "name": "me", "auth": {}})
            case ["api", "models", owner, name, *_] if f"{owner}/{name}" in self.repos:
                return self.answer(200, {"id": f"{owner}/{name}", "sha": COMMIT})
            case [owner, name, "resolve", _, file]:
                if (files := self.repos.get(f"{owner}/{name}")) is None:
                    return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
                if file not in files:
                    return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
                tag = hashlib.sha1(files[file]).hexdigest()
                more = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
                return self.answer(200, files[file], more)
        return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: dict | bytes, headers: dict | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_): ...


@pytest.fixture(scope="module")
def vector():
    torch.manual_seed(0)
    about = {"name": "terse", "model": "some/model", "revision": "abc", "pairs": "24"}
    return ts.SteeringVector._from_means(torch.randn(4, 48), torch.randn(4, 48), about)


@pytest.fixture(scope="module")
def visit(vector, tmp_path_factory):
    """What TALK printed, line by line, and what the Hub then holds."""
    home = tmp_path_factory.mktemp("hub")
    vector.save(home / "v.safetensors")
    handler = type("Fresh", (Hub,), {"repos": {"me/empty": {}}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "PROXY" not in k}
    hub = {"HF_HOME": str(home), "HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
    hub["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    try:
        said = subprocess.run(
            [sys.executable, "-c", TALK, str(home / "v.safetensors")],
            env=kept | hub,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines(), handler.repos


def test_a_published_vector_comes_back_the_same(visit):
    lines, repos = visit
    assert lines[0].endswith("/me/terse")
    assert lines[1:3] == ["True", "True"]
    assert set(repos) == {"me/terse", "me/empty"}
    assert set(repos["me/terse"]) == {"vector.safetensors", "README.md"}


def test_the_card_is_published_with_it(visit, vector):
    assert visit[1]["me/terse"]["README.md"].decode() == vector.card("me/terse")


def test_what_the_hub_refuses_is_said_in_one_sentence(visit):
    assert visit[0][3:] == [
        "PermissionError: the Hub refuses other/terse to you (HTTP 403): check the token in "
        "HF_TOKEN or log in anew with `hf auth login`",
        "ValueError: 'no id at all' is no Hugging Face Hub id (owner/name)",
        "ValueError: 'terse' is no Hugging Face Hub id (owner/name)",
        "FileNotFoundError: the Hugging Face Hub has no me/nothing (where it is private, set "
        "HF_TOKEN to a token that may read it)",
        "FileNotFoundError: me/empty holds no vector.safetensors: it is no tinysteer vector",
    ]


def test_the_card_says_what_the_vector_is(vector):
    text = vector.card("me/terse")
    assert text.startswith('---\nlibrary_name: tinysteer\nbase_model: "some/model"\ntags:\n')
    assert "# terse" in text
    assert 'from_hub("me/terse")' in text
    assert "| pairs | 24 |" in text
    assert f"| 2 | {float(vector.norms[2]):.3f} |" in text


def test_a_card_of_a_model_that_is_not_on_the_hub_names_no_base_model(vector):
    local = ts.SteeringVector(
        vector.directions, vector.norms, vector.targets, vector.baselines, {"model": "a|b"}
    )
    text = local.card("me/terse")
    assert "base_model" not in text
    assert "| model | a\\|b |" in text
