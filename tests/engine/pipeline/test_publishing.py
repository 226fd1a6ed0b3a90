"""`kodalle push` against a hub of the test's own, which speaks the endpoints that huggingface_hub calls."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from engine import cli
from engine.errors import InputError
from engine.pipeline.publishing import push
from tests.paths import REPOSITORY

TOKEN = "hf_secretsecretsecretsecretsecret"
MODEL = REPOSITORY / "models" / "garments"


@dataclass
class Hub:
    """What was made and committed; `refuse` answers a path's beginning with a status."""

    endpoint: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        for beginning, status in self.refuse.items():
            if path.startswith(beginning):
                return status, {"error": f"refused {token}"}  # a hub that quotes what it got
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            self.repos[name] = asked
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        name = path.removeprefix("/api/models/").split("/preupload")[0].split("/commit")[0]
        if "/preupload/" in path:
            listed = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": listed}
        assert "/commit/" in path, path
        lines = [json.loads(line) for line in body.decode().splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.files.setdefault(name, {})[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/abc", "commitOid": "abc"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = made.answer(self.path.partition("?")[0], body, self.headers.get("Authorization", ""))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shipped model of garments, and things beside it that belong to no model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / ".env").write_text(TOKEN)
    return folder


def test_a_model_folder_becomes_a_private_repository(hub: Hub, model: Path) -> None:
    answer = CliRunner().invoke(cli.app, ["push", str(model), "shop/clothes"])
    assert answer.exit_code == 0, answer.output
    assert f"{hub.endpoint}/shop/clothes/commit/abc" in answer.output
    assert 'kodalle generate shop/clothes "a caption"' in answer.output
    assert hub.repos["shop/clothes"]["visibility"] == "private"
    sent = hub.files["shop/clothes"]
    expected = {
        path.name for path in MODEL.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".md", ".onnx")
    }
    expected |= {"SHA256SUMS"}
    assert set(sent) == expected | {"README.md"}
    for name in expected:
        assert sent[name] == (MODEL / name).read_bytes(), name
    assert sent["README.md"].startswith(b"---\nlibrary_name: kodalle-engine\n")
    assert sent["README.md"].endswith((MODEL / "model_card.md").read_bytes())
    assert TOKEN not in answer.output
    assert not any(TOKEN.encode() in content for content in sent.values())


def test_public_and_update(hub: Hub, model: Path) -> None:
    push(model, "shop/open", private=False)
    assert hub.repos["shop/open"].get("visibility") == "public"
    with pytest.raises(InputError, match="name: shop/open: is there already: choose another name, or add --update"):
        push(model, "shop/open")
    assert push(model, "shop/open", update=True).endswith("/shop/open/commit/abc")


@pytest.mark.parametrize(
    ("token", "refuse", "message"),
    [
        (None, {}, r"token: \(none\): log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrongwrongwrong", {}, r"token: \(not shown\): the hub refuses it"),
        (TOKEN, {"/api/repos/create": 403}, r"token: \(not shown\): has no right to write to shop/clothes"),
        (TOKEN, {"/api/models/shop/clothes/commit": 500}, "hub: status 500: nothing of this commit is there"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(
    token: str | None, refuse: dict[str, int], message: str, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    hub.refuse = refuse
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as caught:
        push(model, "shop/clothes")
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value)
    assert not hub.files


def test_no_network_is_one_line(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"hub: http://127.0.0.1:9: the hub cannot be reached"):
        push(model, "shop/clothes", endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the hub cannot be reached: look at the network"):
        push(model, "shop/clothes")


@pytest.mark.parametrize("name", ["clothes", "a/b/c", "/clothes", "./clothes", "a shop/clothes", "shop/--clothes"])
def test_names_that_the_hub_cannot_have(name: str, hub: Hub, model: Path) -> None:
    with pytest.raises(InputError, match=r"name: .*give owner/name"):
        push(model, name)
    assert not hub.repos


def test_what_is_no_model_folder_is_refused_first(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give (a folder|one) that training exported"):
        push(tmp_path, "shop/clothes")
    with pytest.raises(InputError, match=r"give (a folder|one) that training exported"):
        push(tmp_path / "nowhere", "shop/clothes")
    assert not hub.repos
