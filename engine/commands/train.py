"""`kodalle train`: one stage on this machine under DeepSpeed's launcher, or everything from a folder of captioned images."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from engine.errors import InputError

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a training that wrote its checkpoint first


class StoppedTraining(SystemExit):
    """A signal ended a training, which has said how to go on; the code is 128 + the signal's number."""


def train(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|PHOTOS",
            help="a YAML file: one stage as it says; or a folder of captioned images: everything, to a served model",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="with CONFIG, e.g. loop.steps=100 seed=7", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="with PHOTOS: folder of the run; default: runs/<name of PHOTOS>", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="with PHOTOS: stage.key=value, e.g. kodalle.loop.steps=4000", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="with PHOTOS: time for everything; steps are chosen to fit", show_default=False)
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="with PHOTOS: model folder to train on from", show_default=False)
    ] = None,
    cut_out: Annotated[
        bool | None,
        typer.Option(
            "--cut-out/--no-cut-out",
            help="with PHOTOS: objects without their background; default: where most have an outline",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="with PHOTOS: print parameters, memory and minutes of each stage, and stop")
    ] = False,
) -> None:
    """Trains on a folder of captioned images to a model with report, or one stage as CONFIG says; run again, it goes on."""
    if target.is_dir():
        if overrides:
            raise InputError("KEY=VALUE", overrides[0], "is for a config: with a folder write --set stage.key=value")
        from engine.commands.fine_tune import fine_tune, keeps_its_codec
        from engine.commands.train_pictures import train_pictures
        from engine.commands.train_plan import Request

        place = out or Path("runs") / target.resolve().name
        if from_ is not None and keeps_its_codec(from_):
            stated = {"--minutes": minutes, "--cut-out": cut_out, "--plan": plan or None}
            for name, given in stated.items():
                if given is not None:
                    raise InputError(
                        name,
                        given,
                        f"is for models with a KoCLIP and a VQGAN, and {from_} has not both: leave it out",
                    )
            fine_tune(target, from_, place, tuple(set_ or ()))
            return
        train_pictures(Request(target, place, tuple(set_ or ()), minutes, from_, cut_out), only_plan=plan)
        return
    for option, value in (
        ("--out", out),
        ("--set", set_),
        ("--minutes", minutes),
        ("--from", from_),
        ("--cut-out", cut_out),
        ("--plan", plan or None),
    ):
        if value is not None and value != []:
            raise InputError(option, value, f"is for a folder of captioned images, and {target} is none: give a folder")
    _train_stage(target, overrides or [])


def _train_stage(config: Path, overrides: list[str]) -> None:
    """Ends with the exit code of the training."""
    check_deepspeed()
    from engine.config_files import load_run
    from engine.config_folders import check_folders

    check_folders(load_run(config, overrides))  # one line for a bad config, and not one from each process
    import torch

    sys.exit(launch([str(config), *overrides], num_processes=max(1, torch.cuda.device_count())))


def check_deepspeed() -> None:
    """Raises ModuleNotFoundError, without importing it, which takes seconds and prints."""
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")


def launch(arguments: Sequence[str], *, num_processes: int = 1) -> int:
    """Runs `deepspeed engine/train.py --config <first argument> <rest>`, its output passed through; returns its exit code.

    SIGTERM, SIGINT and SIGHUP reach the trainings, and this process waits for their checkpoint. The launcher has a session
    of its own: a terminal's Ctrl-C would reach it too, and it kills a training that still writes.

    Raises:
        StoppedTraining: by a signal to this process.
    """
    received = 0
    launcher = subprocess.Popen(
        launcher_command(arguments, num_processes=num_processes), env=launcher_environment(), start_new_session=True
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received = received or number
        _stop(launcher)

    previous: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            previous[number] = signal.signal(number, pass_on)
    try:
        code = launcher.wait()
    finally:
        for changed, handler in previous.items():
            signal.signal(changed, handler)
    if received:
        if code not in _STOPPED:  # else the training has said so, with its step
            print("stopped before the next checkpoint: run the same command to go on", file=sys.stderr, flush=True)
        raise StoppedTraining(128 + received)
    return code


def _stop(launcher: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the trainings themselves: the launcher would send it to their loaders of data too, and kill after 30 s."""
    import psutil

    try:
        below = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    trainings = []
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            parent = process.parent()
            if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
                trainings.append(process)
    for process in trainings:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    if not trainings:  # the launcher is still starting: there is nothing to lose
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGTERM)


def launcher_command(arguments: Sequence[str], *, num_processes: int = 1) -> list[str]:
    """`deepspeed engine/train.py --config <first argument> <rest>` on this machine."""
    script = Path(__file__).parents[1] / "train.py"
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes),
        "--master_port", str(_free_port()), "--log_level", "critical", str(script), "--config", *arguments,
    ]  # fmt: skip


def launcher_environment() -> dict[str, str]:
    """This process's variables, with DeepSpeed on the CPU where there is no GPU."""
    import torch

    return dict(os.environ) | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
