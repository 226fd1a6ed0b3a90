"""`kodalle train`: one training run on this machine, under DeepSpeed's launcher."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import InputError


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/demo/vqgan.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. loop.steps=100 seed=7", show_default=False),
    ] = None,
) -> None:
    """Trains VQGAN, KoCLIP or KoDALLE as CONFIG says, on all GPUs or on the CPU; run again, it resumes."""
    check_deepspeed()
    import torch

    from engine.config_files import load_run

    load_run(config, overrides or [])  # one line for a bad config, and not one from each process
    command = launcher_command([str(config), *(overrides or [])], num_processes=max(1, torch.cuda.device_count()))
    os.execve(command[0], command, launcher_environment())  # signals and the exit code are the launcher's


def check_deepspeed() -> None:
    """Raises ModuleNotFoundError, without importing it, which takes seconds and prints."""
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")


def launch(arguments: Sequence[str]) -> None:
    """`deepspeed engine/train.py --config <first argument> <rest>` on one process, its output passed through.

    Raises:
        InputError: it did not end well; what it printed stands above.
    """
    code = subprocess.run(launcher_command(arguments), env=launcher_environment(), check=False).returncode
    if code:
        raise InputError("training", arguments[0], f"ended with exit code {code}; run the command again to go on")


def launcher_command(arguments: Sequence[str], *, num_processes: int = 1) -> list[str]:
    """`deepspeed engine/train.py --config <first argument> <rest>` on this machine."""
    script = Path(__file__).parents[1] / "train.py"
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_processes),
        "--master_port", str(_free_port()), "--log_level", "warning", str(script), "--config", *arguments,
    ]  # fmt: skip


def launcher_environment() -> dict[str, str]:
    """This process's variables, with DeepSpeed on the CPU where there is no GPU."""
    import torch

    return dict(os.environ) | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
