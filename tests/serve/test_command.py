"""The `python -m serve` command: input errors in one line, settings, keys, start and stop."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import InputError
from serve import command
from serve.api.keys import KeyRing
from serve.arguments import AppArguments, HttpOptions, read_arguments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes for a model folder without being loaded."""
    (tmp_path / "kodalle").mkdir()
    (tmp_path / "kodalle" / "config.json").write_text("{}")
    return tmp_path / "kodalle"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a start that ended with code 2."""
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------------------------------- input errors


def test_a_missing_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL: ./none" in refusal(monkeypatch, capsys, "./none")


def test_a_folder_that_is_not_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "config.json is missing" in refusal(monkeypatch, capsys, str(tmp_path))


def test_a_port_in_use_even_by_a_process_that_would_share_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxy does
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port: {port}" in refusal(monkeypatch, capsys, str(folder), "--port", str(port))
        with socket.socket() as second:  # without the check both would serve, every other request each
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            second.bind(("127.0.0.1", port))
            second.listen()
    assert command.free_port("127.0.0.1", port) == port


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_that_other_machines_can_reach_without_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, host: str
) -> None:
    line = refusal(monkeypatch, capsys, str(folder), "--host", host)
    assert f"--host: {host}" in line
    assert "--keys" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    command.check_exposure(host, "")
    command.check_exposure("0.0.0.0", "keys.yaml")


@pytest.mark.parametrize("content", [None, "keys: [1]", "keys: {", "- a"])
def test_a_missing_or_malformed_keys_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    content: str | None,
) -> None:
    keys = tmp_path / "keys.yaml"
    if content is not None:
        keys.write_text(content)
    assert str(keys) in refusal(monkeypatch, capsys, str(folder), "--keys", str(keys))


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"num_worker": 2}, "num_worker"),
        ({"num_workers": 0}, "num_workers"),
        ({"num_workers": 3, "max_workers": 2}, "max_workers"),
        ({"deadline_s": -1}, "deadline_s"),
    ],
)
def test_a_config_with_an_invalid_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, args: Any, field: str
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
    line = refusal(monkeypatch, capsys, "--config", str(config))
    assert field in line
    assert str(config) in line


@pytest.mark.parametrize(
    ("http_options", "application", "field"),
    [
        ({"port": "x"}, {}, "port"),
        ({"port": 70000}, {}, "port"),
        ({"keep_alive_timeout_s": 0}, {}, "keep_alive_timeout_s"),
        ({"root_path": "/a"}, {}, "root_path"),
        ({"keepalive": 75}, {}, "keepalive"),
        ({}, {"route_prefix": "/kodalle"}, "route_prefix"),
        ({}, {"route_prefix": None}, "route_prefix"),
        ({}, {"args": {"root_path": "kodalle"}}, "root_path"),
        ({}, {"args": {"root_path": "/kodalle/"}}, "root_path"),
        ({}, {"args": {"root_path": "/page"}}, "root_path"),
        ({}, {"args": {"allowed_origins": ["*"]}}, "allowed_origins"),
    ],
)
def test_a_config_with_an_option_that_would_be_ignored_or_is_invalid(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    http_options: Any,
    application: Any,
    field: str,
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": [application], "http_options": http_options}))
    assert field in refusal(monkeypatch, capsys, "--config", str(config))


@pytest.mark.parametrize(
    "content", ["[1]", "applications: 3", "applications: [1, 2]", "a: {", "applications: [{args: 1}]"]
)
def test_a_malformed_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(content)
    assert str(config) in refusal(monkeypatch, capsys, "--config", str(config))
    assert "nowhere.yaml" in refusal(monkeypatch, capsys, "--config", "nowhere.yaml")


def test_a_model_error_in_rays_traceback_is_reported_in_one_line() -> None:
    traceback = (
        "Deploying application kodalle failed: The deployment failed to start 3 times in a row. Error:\n"
        "ray::ServeReplica:kodalle:Worker.initialize() (pid=1, ip=127.0.0.1)\n"
        '  File "engine/models/folder.py", line 1, in load_part\n'
        "engine.errors.InputError: model folder: /models/x: has no transformer: train one\n"
    )
    found = command._start_error(RuntimeError(traceback))
    assert isinstance(found, InputError)
    assert str(found) == "model folder: /models/x: has no transformer: train one"
    other = RuntimeError("the raylet died")
    assert command._start_error(other) is other


# --------------------------------------------------------------------------------------------------------------- settings


def test_the_command_line_overrides_the_config(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    args = {"model": "elsewhere", "num_workers": 3, "deadline_s": 9.0}
    config.write_text(yaml.safe_dump({"applications": [{"args": args}], "http_options": {"port": 0, "host": "::1"}}))
    seen: dict[str, Any] = {}

    def start(arguments: AppArguments, http: HttpOptions) -> int:
        seen.update(arguments=arguments, http=http)
        return 0

    monkeypatch.setattr(command, "_run_with_ray", start)
    command_line = (str(folder), "--config", str(config), "--workers", "2", "--no-page", "--root-path", "/kodalle")
    assert run(monkeypatch, *command_line) == 0
    arguments = seen["arguments"]
    assert arguments.model == str(folder.resolve())
    assert (arguments.num_workers, arguments.deadline_s, arguments.page) == (2, 9.0, False)
    assert arguments.root_path == "/kodalle"
    assert (seen["http"].host, seen["http"].port > 0, seen["http"].keep_alive_timeout_s) == ("::1", True, 75)
    assert run(monkeypatch, *command_line, "--keep-alive", "620") == 0
    assert seen["http"].keep_alive_timeout_s == 620


def test_workers_share_the_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for args, cores in (
        ({"num_workers": 2}, 4.0),
        ({"num_workers": 2, "max_workers": 8}, 1.0),
        ({"num_workers": 99}, 1.0),
        ({"num_workers": 2, "cpus_per_worker": 3}, 3.0),
    ):
        assert command._with_cores(read_arguments(args, source="test")).cpus_per_worker == cores


def test_a_change_of_process_numbers_does_not_change_the_replicas_settings() -> None:
    few = read_arguments({"model": "m", "num_workers": 1}, source="test")
    many = read_arguments({"model": "m", "num_workers": 4, "num_api_servers": 2, "max_workers": 8}, source="test")
    assert few.settings() == many.settings()
    assert few.settings() != read_arguments({"model": "n"}, source="test").settings()


def test_rays_token_file_is_private_to_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        os, "environ", os.environ.copy() | {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}
    )
    before = os.umask(0o077)
    try:
        command._set_environment(AppArguments(), tmp_path)
    finally:
        os.umask(before)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert os.environ["RAY_AUTH_MODE"] == "token", "it cannot be switched off"
    assert "RAY_ADDRESS" not in os.environ, "the Ray is private"


# ------------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_created_printed_once_and_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    monkeypatch.setattr(sys, "argv", ["serve", "key", "shop", "--file", str(file), "--per-minute", "30"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    secret = capsys.readouterr().out.strip()
    assert secret not in file.read_text()
    found = KeyRing(file).find(secret, time.time())
    assert not isinstance(found, str)
    assert (found.key_id, found.per_minute) == ("shop", 30)
    assert "is taken" in refusal(monkeypatch, capsys, "key", "shop", "--file", str(file))


# ---------------------------------------------------------------------------------------------------- a server without Ray


@pytest.fixture
def server(kodalle_run: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`python -m serve --without-ray`, and its address."""
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "serve", str(kodalle_run / "model"), "--without-ray", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("{"):
                break
        assert lines, log.read_text()
        assert lines[0].endswith("on CPU\n")
        address = str(json.loads(lines[-1])["url"])
        assert lines[1:-1] == [f"page  {address}/\n", f"API   {address}/v1\n"]
        yield process, address
    finally:
        process.kill()
        process.wait()


def request(address: str, method: str, path: str, fields: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    body = None if fields is None else json.dumps(fields)
    connection.request(method, path, body, {"content-type": "application/json"})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


@pytest.mark.exclusive
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_it_prints_its_address_when_ready_and_exits_with_0_on_a_signal(
    server: tuple["subprocess.Popen[str]", str], number: signal.Signals
) -> None:
    process, address = server
    assert request(address, "GET", "/readyz")[0] == 200
    status, answer = request(address, "POST", "/v1/images/generations", {"prompt": "빨강", "seed": 1, "candidates": 2})
    assert (status, len(answer["data"])) == (200, 1)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0


# ------------------------------------------------------------------------------------------------------ a Ray that fails


@pytest.fixture
def private_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which a start with Ray makes its own; what the start sets in the environment ends with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, private_folders: Path
) -> None:
    from serve import local_ray

    def fail(**_: Any) -> None:
        assert len(list(private_folders.iterdir())) == 1
        raise Exception("The current node timed out during startup.\nSome of the raylet failed")  # as Ray does

    monkeypatch.setattr(local_ray.ray, "init", fail)
    before = os.umask(0o022)
    try:
        assert run(monkeypatch, str(folder), "--port", "0") == 2
    finally:
        os.umask(before)
    loading, line = capsys.readouterr().err.splitlines()
    assert loading.startswith("loading ")
    assert line.startswith("error: Ray: Exception: The current node timed out during startup.: ")
    assert "--without-ray" in line
    assert list(private_folders.iterdir()) == []


def test_a_signal_while_ray_is_imported_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, folder: Path, private_folders: Path
) -> None:
    def stop(private: Path, *_: Any) -> int:
        assert (private / "token").is_file()
        raise SystemExit(143)  # what the handler of SIGTERM raises

    monkeypatch.setattr(command, "_run_ray_in", stop)
    before = os.umask(0o022)
    try:
        assert run(monkeypatch, str(folder), "--port", "0") == 143
    finally:
        os.umask(before)
    assert list(private_folders.iterdir()) == []
