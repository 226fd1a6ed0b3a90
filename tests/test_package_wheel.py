"""The wheel, installed outside the checkout with its declared requirements alone: it generates, trains and serves."""

import contextlib
import json
import signal
import subprocess
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from tests.package_environment import Environment, build_wheel, environment_variables, make_environment
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.package, pytest.mark.slow]

MODEL = str(REPOSITORY / "models" / "garments")
CAPTION = "상의에서 색상은 레드이다."


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install kodalle-engine`, nothing else."""
    made = make_environment(tmp_path_factory.mktemp("bare"))
    made.install(wheel)
    return made


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without extras, with taming as its remedy says."""
    made = make_environment(tmp_path_factory.mktemp("core"))
    made.install(wheel)
    made.link("taming-transformers-rom1504")
    return made


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("full"))
    made.install(wheel, extras=("train", "serve"))
    made.link("taming-transformers-rom1504")
    return made


def _generate(environment: Environment, cwd: Path) -> subprocess.CompletedProcess[str]:
    options = ["--candidates", "1", "--top", "1", "--seed", "7", "--out", "made", "--device", "cpu"]
    return environment.kodalle("generate", MODEL, CAPTION, *options, cwd=cwd)


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"kodalle_engine-{engine.__version__}"
    assert {name.partition("/")[0] for name in names} == {
        "engine", "kernels", "serve", f"{info}.dist-info", f"{info}.data"
    }  # fmt: skip
    assert {"engine/py.typed", "kernels/py.typed", "serve/py.typed", "serve/page/index.html"} <= set(names)
    sources = [
        path.relative_to(REPOSITORY)
        for room in ("engine", "kernels", "serve")
        for path in (REPOSITORY / room).rglob("*")
    ]
    shipped = {str(path) for path in sources if (REPOSITORY / path).is_file() and "__pycache__" not in path.parts}
    assert shipped - set(names) == set()


def test_version(bare: Environment, tmp_path: Path) -> None:
    answer = bare.kodalle("--version", cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (0, f"kodalle-engine {engine.__version__}\n"), answer.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", MODEL, CAPTION), "taming: not installed: pip install --no-deps taming-transformers-rom1504"),
        (("train", "run.yaml"), "deepspeed: not installed: pip install 'kodalle-engine[train]'"),
        (("serve", MODEL), "uvicorn: not installed: pip install 'kodalle-engine[serve]'"),
        (("evaluate", MODEL, "."), "taming: not installed: pip install --no-deps taming-transformers-rom1504"),
        pytest.param(  # a second command without taming
            ("demo",),
            "taming: not installed: pip install --no-deps taming-transformers-rom1504",
            marks=pytest.mark.soak,
        ),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else "",
)
def test_what_is_missing_is_one_line(arguments: tuple[str, ...], line: str, bare: Environment, tmp_path: Path) -> None:
    answer = bare.kodalle(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines() == [f"error: {line}"]


def test_generates_without_extras(core: Environment, tmp_path: Path) -> None:
    """Neither deepspeed nor ray can be imported in this environment."""
    answer = _generate(core, tmp_path)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "made" / "result.json").read_text(encoding="utf-8"))
    assert (tmp_path / "made" / result["candidates"][0]["file"]).stat().st_size > 0


def test_demo_finds_its_configs(core: Environment, tmp_path: Path) -> None:
    """They come with the wheel; what is missing for the rest is reported before anything is made."""
    answer = core.kodalle("demo", cwd=tmp_path)
    assert answer.stderr.splitlines() == ["error: deepspeed: not installed: pip install 'kodalle-engine[train]'"]
    assert list(tmp_path.iterdir()) == []


def test_trains(full: Environment, run_tree: Any, write_tree: Any, tmp_path: Path) -> None:
    tree = run_tree("vqgan", tmp_path / "run")
    answer = full.kodalle("train", str(write_tree(tree, tmp_path / "run.yaml")), "loop.steps=2", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "model" / "vqgan.safetensors").is_file()


def test_serves_one_request(full: Environment, tmp_path: Path) -> None:
    with _server(full, tmp_path) as url:
        body = json.dumps({"prompt": CAPTION, "n": 1}).encode()
        request = urllib.request.Request(f"{url}/v1/images/generations", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["data"][0]["b64_json"]
        with urllib.request.urlopen(f"{url}/", timeout=20) as page:
            assert b"<html" in page.read()


@contextlib.contextmanager
def _server(environment: Environment, folder: Path) -> Iterator[str]:
    command = [
        str(environment.folder / "bin" / "kodalle"),
        "serve",
        MODEL,
        "--without-ray",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(
        command, cwd=folder, env=environment_variables(), stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith("{")), None)
            assert ready is not None, (folder / "log").read_text(encoding="utf-8")
            yield json.loads(ready)["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
