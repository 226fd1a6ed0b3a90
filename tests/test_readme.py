"""The README's command blocks run from top to bottom, at a tiny size; what documents name is there."""

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import COLOURS, KOCLIP, TRANSFORMER, VQGAN
from tests.engine.commands.test_train_pictures import TINY
from tests.forked import DEEPSPEED, Job, fork
from tests.paths import REPOSITORY

README, KOREAN = REPOSITORY / "README.md", REPOSITORY / "README.ko.md"
DOCUMENTS = sorted([README, KOREAN, *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "CONTRIBUTING.md"])
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
_TINY_LOOP = {"steps": 2, "validate_every": 2, "validation_batches": 1, "sample_every": 2, "checkpoint_every": 2}
_VOCABULARY = 60
_READY_WITHIN_S = 120
_ENDS_WITHIN_S = 900  # of one command, on a machine that does much else
_PRELOAD = [
    *DEEPSPEED, "transformers", "engine.commands.generate", "engine.training.trainer",
    *(f"engine.training.stage_{stage}" for stage in ("vqgan", "koclip", "kodalle")),
]  # fmt: skip


def _blocks(document: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(document.read_text(encoding="utf-8"))


def _commands(block: str) -> list[str]:
    """One line a command, continuation lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [line for line in (re.sub(r"\s+#.*$", "", line).strip() for line in lines) if line]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_both_languages_show_the_same_commands() -> None:
    english, korean = (
        [(kind, [re.sub(r"\s+#.*$", "", line) for line in block.splitlines()]) for kind, block in _blocks(document)]
        for document in (README, KOREAN)
    )
    assert english == korean


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [target for target in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = set(
        re.findall(r"`((?:engine|kernels|serve|configs|benchmarks|tests|docs|models)/[\w./-]+)`", document.read_text())
    )
    assert sorted(name for name in named if not (REPOSITORY / name).exists()) == []


def test_the_architecture_shows_the_layers_that_are_checked() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [one["layers"] for one in contracts if one["name"] == "rooms inside engine"]
    checked = [set(layer.split(" | ")) for layer in layers]
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    [shown] = [
        block for block in re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "cli | train" in block
    ]
    assert [set(layer.strip().split(" | ")) for layer in shown.split(">")] == checked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout in small: the shipped models, configs of tiny models under the shipped ones' names, some photographs."""
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    (tmp_path / "configs" / "clothing").mkdir(parents=True)
    for stage, model in (("vqgan", VQGAN), ("koclip", KOCLIP), ("kodalle", TRANSFORMER)):
        tree = yaml.safe_load((REPOSITORY / "configs" / "clothing" / f"{stage}.yaml").read_text(encoding="utf-8"))
        tree["model"] = dict(model)
        if "text_vocab_size" in model:
            tree["model"]["text_vocab_size"] = _VOCABULARY
        tree["loop"] = dict(_TINY_LOOP)
        tree["deepspeed"]["train_micro_batch_size_per_gpu"] = 4
        _shrink(tree)
        (tmp_path / "configs" / "clothing" / f"{stage}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path


def _shrink(tree: dict[str, object]) -> None:
    """What must fit the tiny model and the few photographs, or takes minutes."""
    tree.pop("codebook_reset", None)
    if isinstance(loss := tree.get("loss"), dict):
        loss["perceptual_shift"] = 0
    if "text" in tree:
        tree["text"] = {"tokenizer": "train", "vocab_size": _VOCABULARY}
    if "augmented_views" in tree:
        tree |= {"augmented_views": 1, "augment_shift": 1}


@pytest.mark.slow
def test_the_commands_run_from_top_to_bottom(shell: "_Shell", folder: Path) -> None:
    _take_photographs(folder / "PHOTOS")
    for kind, block in _blocks(README):
        if kind == "python":
            shell.run_python(block)
            continue
        for command in _commands(block):
            shell.run(command)
    made = {"runs/mine/model/config.json", "runs/mine/report.html", "runs/vqgan/model/config.json", "best.png"}
    made |= {"generations/sheet.png", "completed/result.json"}
    assert sorted(name for name in made if not (folder / name).exists()) == []


def _take_photographs(folder: Path) -> None:
    """The reader's own: squares of different sizes in one colour, with its name as a caption."""
    folder.mkdir()
    for number, (name, colour) in enumerate(list(COLOURS.items()) * 5):
        photo = Image.new("RGB", (80, 60), "gray")
        photo.paste(colour, (0, 0, 30 + number, 30 + number))
        photo.save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"{name} 네모", encoding="utf-8")


class _Shell:
    """Runs the README's commands in a folder, each in a process of its own; a server runs on in the background.

    `kodalle` and Python's blocks run in processes that are forked with the engine imported, which starting Python would
    take most of the time for; tests/test_package_wheel.py starts the installed command.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: BaseProcess | None = None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]

    def run(self, command: str) -> None:
        command = command.replace("8000", str(self._port))
        if command.startswith(("pip ", "pip3 ")):
            return  # tests/test_package_wheel.py installs
        if command.startswith("make "):
            subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=REPOSITORY, check=True, capture_output=True)
        elif command.startswith("kodalle train PHOTOS "):
            tiny = [f"--set {one}" for one in (*TINY, "vqgan.model.image_size=32")]
            tiny_command = " ".join([command.replace("--minutes 90", "--minutes 20"), *tiny])
            self._check(tiny_command, (_kodalle, (self._words(tiny_command), self._folder, True)))
        elif command.startswith("kodalle serve "):
            self._serve(f"{command} --without-ray")
        elif command.startswith("kodalle "):
            self._check(command, (_kodalle, (self._words(command), self._folder)))
        else:
            assert command.startswith("curl "), command
            assert '"b64_json"' in self._bash(command)

    def run_python(self, block: str) -> None:
        self._check(block, (_python, (block.replace("8000", str(self._port)), self._folder)))

    def _words(self, command: str) -> list[str]:
        """As the shell splits and expands them."""
        return self._bash(f"printf '%s\\0' {command}").split("\0")[:-1]

    def _bash(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=_ENDS_WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _check(self, what: str, job: Job) -> None:
        output = self._folder / "printed.txt"
        child = fork(job, output, preload=_PRELOAD, daemon=False)
        child.join(_ENDS_WITHIN_S)
        assert child.exitcode == 0, f"{what}\n{output.read_text(encoding='utf-8')[-4000:]}"

    def _serve(self, command: str) -> None:
        job = (_kodalle, (self._words(command), self._folder))
        self._server = fork(job, self._folder / "server.txt", preload=_PRELOAD, daemon=False)
        ends = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < ends:
            assert self._server.is_alive(), (self._folder / "server.txt").read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/readyz", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the server did not become ready")

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.join(60)
            assert self._server.exitcode == 0


def _kodalle(words: list[str], folder: Path, trains_here: bool = False) -> None:
    """The command.

    Args:
        trains_here: its trainings run in this process, where it would start DeepSpeed's launcher for each: three processes
            that import torch. The README's other training goes through the launcher.
    """
    from engine import cli, train
    from engine.commands import stages

    def train_here(arguments: Sequence[str], **_: int) -> int:
        sys.argv = ["train.py", "--config", *arguments]
        return train.main()

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # of the launcher's processes
    if trains_here:
        vars(stages)["launch"] = train_here
    sys.argv = words
    cli.main()


def _python(block: str, folder: Path) -> None:
    os.chdir(folder)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.fixture
def shell(folder: Path) -> Iterator[_Shell]:
    shell = _Shell(folder)
    yield shell
    shell.stop()
