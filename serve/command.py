"""The `python -m serve` command: serves the page and the API on one port, and creates API keys.

    python -m serve [MODEL] [--host 127.0.0.1] [--port 8000] [--workers N] [--keys FILE] [--config FILE] [--without-ray]
    kodalle serve key NAME --file keys.yaml

Starts a private Ray, or with --without-ray one worker in this process. Once the server is ready, prints its address and
its model. SIGTERM and SIGINT: refuses new requests, finishes the accepted ones, exits with 0.

Exit codes: 0 stopped by a signal, 1 requests were cut off or Ray died, 2 bad input: one line on stderr naming field,
value and remedy.
"""

import contextlib
import http.client
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.error_lines import run_app
from engine.errors import InputError
from engine.files import is_hub_name
from serve.api.keys import KeyRing, KeyScope, add_key
from serve.arguments import AppArguments, HttpOptions, read_arguments, read_http_options, read_serve_config
from serve.cluster.gate import MAX_BODY_VARIABLE, ORIGINS_VARIABLE
from serve.cluster.ray_environment import ONE_MACHINE_ENVIRONMENT, SERVE_ENVIRONMENT
from serve.messages import ModelInfo
from serve.process import log_to_stderr

_READY_WITHIN_S = 60.0  # after the application has started
_CHECK_EVERY_S = 5.0
_CHECKS_FAILED = 3

# Two commands rather than a group: a model's name stands where a subcommand's would.
app = typer.Typer(no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False)
key_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def start(
    model: Annotated[str | None, typer.Argument(help="model folder, or owner/name; default: models/clothing")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; beyond this machine only with --keys")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: a free one; default 8000")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes that generate; default 1")] = None,
    keys: Annotated[Path | None, typer.Option(help="API keys, see `kodalle serve key --help`")] = None,
    config: Annotated[Path | None, typer.Option(help="a Ray Serve config, e.g. configs/serve.yaml")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit arithmetic on a CPU: faster, slightly different images")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="the transformer's on a CPU: int8, or int4, coarser; default: as --int8 says")
    ] = None,
    keep_alive: Annotated[
        int | None, typer.Option(min=1, help="seconds that an idle connection stays open; default 75")
    ] = None,
    root_path: Annotated[str | None, typer.Option(help="path under which a proxy publishes the server")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse prompts with words that the model does not know")
    ] = False,
    no_page: Annotated[bool, typer.Option("--no-page", help="serve the API only")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="log captions")] = False,
    without_ray: Annotated[bool, typer.Option("--without-ray", help="one process, one worker")] = False,
) -> None:
    """Serves a model: the designers' page and an API compatible with OpenAI's. `key NAME` creates an API key."""
    values, http_options = ({}, {}) if config is None else read_serve_config(config)
    options = {"model": model, "num_workers": workers, "keys_file": None if keys is None else str(keys)}
    options |= {"device": device, "int8": int8 or None, "weights": weights, "log_prompts": log_prompts or None}
    options |= {"page": False if no_page else None, "root_path": root_path, "strict": strict or None}
    values |= _given(options)
    http_options |= _given({"host": host or None, "port": port, "keep_alive_timeout_s": keep_alive})
    source = "the command line" if config is None else str(config)
    arguments, http = read_arguments(values, source=source), read_http_options(http_options, source=source)
    check_model(arguments.model)
    check_exposure(http.host, arguments.keys_file)
    if arguments.keys_file:
        KeyRing(Path(arguments.keys_file))  # read again by the API servers; here so that an error is reported at once
    http = http.model_copy(update={"port": free_port(http.host, http.port)})
    note = "" if without_ray else ", starting Ray: about half a minute"
    print(f"loading {arguments.model}{note}", file=sys.stderr, flush=True)
    run = _run_without_ray if without_ray else _run_with_ray
    raise typer.Exit(run(_absolute(arguments), http))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@key_app.command()
def key(
    name: Annotated[str, typer.Argument(help="id of the key's holder, as it appears in logs")],
    file: Annotated[Path, typer.Option(help="keys file; created when missing")],
    per_minute: Annotated[
        float | None, typer.Option(help="images a minute, candidates included; default: no limit")
    ] = None,
    no_metrics: Annotated[bool, typer.Option("--no-metrics", help="allow generation but not /metrics")] = False,
) -> None:
    """Creates an API key, prints it once, and stores its hash."""
    scopes: tuple[KeyScope, ...] = ("generate",) if no_metrics else ("generate", "metrics")
    print(add_key(file, name, scopes=scopes, per_minute=per_minute), flush=True)
    print(f"The key is shown only this once: {file} stores its hash.", file=sys.stderr)


# -------------------------------------------------------------------------------------------- checks before the start


def check_model(model: str) -> None:
    """Raises InputError unless `model` is a model folder or a hub name; its contents are checked when it is loaded."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError("MODEL", model, "is not a model folder: config.json is missing")
    elif folder.exists() or not is_hub_name(model):
        raise InputError("MODEL", model, "no such model folder: give one that training exported, or models/clothing")


def check_exposure(host: str, keys_file: str) -> None:
    """Raises InputError for an address that other machines can reach, without API keys."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise InputError("--host", host, f"is not an address of this machine ({error})") from error
    if not keys_file and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        remedy = (
            "other machines can reach it: create a key with `kodalle serve key NAME --file keys.yaml` and pass --keys"
        )
        raise InputError("--host", host, remedy)


def free_port(host: str, port: int) -> int:
    """`port`, after checking that it is free; for 0, a free port.

    Ray's proxy binds with SO_REUSEPORT, so a second server on the same port would start without an error and get every
    other request.

    Raises:
        InputError: the port is in use or cannot be bound.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was stopped a moment ago
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise InputError("--port", port, f"cannot be used on {host} ({error.strerror}): choose another") from error
        return int(probe.getsockname()[1])


def _absolute(arguments: AppArguments) -> AppArguments:
    """Arguments with absolute paths: replicas run in folders that Ray chooses."""
    paths = {"model": arguments.model if not Path(arguments.model).exists() else str(Path(arguments.model).resolve())}
    for name in ("keys_file", "c2pa_key", "c2pa_certificates"):
        if getattr(arguments, name):
            paths[name] = str(Path(getattr(arguments, name)).resolve())
    return arguments.model_copy(update=paths)


# ----------------------------------------------------------------------------------------------------------- running


def _run_with_ray(arguments: AppArguments, http: HttpOptions) -> int:
    os.umask(0o077)  # the session's logs and its token are this user's
    private = Path(tempfile.mkdtemp(prefix="kodalle-"))  # and stays so: Ray opens its own temp_dir to all users
    try:  # from here on: a signal may come while ray is imported
        _set_environment(arguments, private)
        return _run_ray_in(private, arguments, http)
    finally:
        _remove(private)


def _run_ray_in(private: Path, arguments: AppArguments, http: HttpOptions) -> int:
    from serve.local_ray import drain, end_local, is_alive, served_model, start_local

    stop_signal = threading.Event()
    try:
        try:
            start_local(_with_cores(arguments), http, temp_dir=str(private / "ray"))
        except RuntimeError as error:
            raise _start_error(error) from error
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which takes SIGTERM for itself
            signal.signal(number, lambda *_: stop_signal.set())
        _wait_until_ready(http.host, http.port)
        _announce(served_model(), host=http.host, port=http.port, page=arguments.page, workers=arguments.num_workers)
        return 0 if _wait_for(stop_signal, is_alive) and drain(within_s=arguments.drain_s) else 1
    finally:
        end_local()


def _remove(folder: Path) -> None:
    """Deletes a folder; retries, because processes that are ending may still write into it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _set_environment(arguments: AppArguments, folder: Path) -> None:
    """Sets Ray's environment variables before ray is imported.

    Values that the user has set are kept, except for the token and the settings that it protects.
    """
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="ascii")
    largest = max(arguments.limits.max_json_bytes, arguments.limits.max_edit_bytes)
    os.environ |= ONE_MACHINE_ENVIRONMENT | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        MAX_BODY_VARIABLE: str(largest),
        ORIGINS_VARIABLE: " ".join(arguments.allowed_origins),
    }
    os.environ.pop("RAY_ADDRESS", None)  # another cluster's


def _with_cores(arguments: AppArguments) -> AppArguments:
    """All cores divided among the workers, unless `cpus_per_worker` is given: Ray sets a process's threads to its cores."""
    if "cpus_per_worker" in arguments.model_fields_set:
        return arguments
    most_workers = max(arguments.num_workers, arguments.max_workers)
    return arguments.model_copy(update={"cpus_per_worker": float(max(1, (os.cpu_count() or 1) // most_workers))})


def _run_without_ray(arguments: AppArguments, http: HttpOptions) -> int:
    from serve.api.application import build_api
    from serve.api.listener import listener
    from serve.local_pool import LocalPool

    log_to_stderr()
    settings = arguments.settings()
    pool = LocalPool(settings)
    try:
        server = listener(
            build_api(pool, settings),
            host=http.host,
            port=http.port,
            drain_s=settings.drain_s,
            keep_alive_s=http.keep_alive_timeout_s,
        )
        announcing = threading.Thread(
            target=_announce_when_ready, args=(pool.worker.info, http.host, http.port, settings.page)
        )
        announcing.daemon = True
        announcing.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn stops, and then raises the signal once more
            signal.signal(number, lambda *_: None)
        server.run()
        return 0 if server.started else 1
    finally:
        pool.close()


def _announce_when_ready(info: ModelInfo, host: str, port: int, page: bool) -> None:
    _wait_until_ready(host, port)
    _announce(info, host=host, port=port, page=page, workers=1)


def _wait_until_ready(host: str, port: int) -> None:
    """Returns once GET /readyz is 200; raises InputError after `_READY_WITHIN_S`."""
    ends_at = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < ends_at:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(_own_address(host), port, timeout=5)
            with contextlib.closing(connection):
                connection.request("GET", "/readyz", headers={"host": "localhost"})
                if connection.getresponse().status == 200:
                    return
        time.sleep(0.1)
    raise InputError("server", f"{host}:{port}", f"did not become ready within {_READY_WITHIN_S:g} s")


def _announce(info: ModelInfo, *, host: str, port: int, page: bool, workers: int) -> None:
    address = _own_address(host)
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    where = "CPU" if info.device == "cpu" else f"GPU {info.device}"
    several = f", {workers} workers" if workers > 1 else ""
    size = f"{info.num_parameters / 1e6:.1f} M, {info.image_size} px"
    print(f"KoDALLE serves {info.model_id} ({size}) on {where}{several}")
    if page:
        print(f"page  {url}/")
    print(f"API   {url}/v1", flush=True)
    print(json.dumps({"ready": True, "url": url, "model": info.model_id, "device": info.device}), flush=True)


def _own_address(host: str) -> str:
    """An address at which this machine reaches a server that listens at `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _wait_for(stop_signal: threading.Event, is_alive: Callable[[], bool]) -> bool:
    """Waits until the stop signal; False when Ray died before."""
    num_failed = 0
    while not stop_signal.wait(_CHECK_EVERY_S):
        num_failed = 0 if is_alive() else num_failed + 1
        if num_failed >= _CHECKS_FAILED:
            print("error: Ray no longer answers: start the server again", file=sys.stderr)
            return False
    return True


def _start_error(error: RuntimeError) -> Exception:
    """The InputError inside the traceback that Ray reports for a replica that did not start; else `error` itself."""
    found = re.search(r"InputError: (.+?): (.+?): (.+)", str(error))
    return error if found is None else InputError(*(part.strip() for part in found.groups()))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. `key` is a subcommand, so a model folder of that name is written ./key."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["key"]:
        run_app(key_app, arguments[1:], prog_name="kodalle serve key")
    run_app(app, arguments, prog_name="kodalle serve")
