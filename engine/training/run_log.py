"""The log of a run: log.jsonl with one line a step, TensorBoard events, sample images."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine.files import as_disk_fault

FLUSH_EVERY = 10  # steps after which the trainer writes the log; until then scalars stay on the device, unread

Scalar = Tensor | float | Callable[[], float]  # a tensor or function is read when the log is flushed


class RunLog:
    """Writer of one process; every method is a no-op where `enabled` is False (ranks other than 0).

    A resumed run first cuts the lines of steps that it will run again, so that each step is there once.
    """

    def __init__(self, folder: Path, *, resume_step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.folder = folder
        self._pending: list[tuple[int, Mapping[str, Scalar]]] = []
        if not enabled:
            return
        path = folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) is not None and (_step_of(line) or 0) <= resume_step]
            temporary = path.with_name(".log.jsonl")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._previous_hook = threading.excepthook
        threading.excepthook = self._report
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, Scalar]) -> None:
        """One line of log.jsonl for optimiser step `step` (1-based), written at the next `flush`."""
        if self.enabled:
            self._pending.append((step, values))

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """A line of its own, names prefixed with `validation_`."""
        if self.enabled:
            self.flush()
            self._write(step, {f"validation_{name}": value for name, value in values.items()})
            self._file.flush()
            self._board.flush()

    def image(self, step: int, image: Image.Image) -> None:
        """samples/step-<n>.png and the same in TensorBoard."""
        if not self.enabled:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        image.save(self.folder / "samples" / f"step-{step:08d}.png")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self._board.add_image("samples", pixels.view(image.height, image.width, 3), step, dataformats="HWC")

    def flush(self, *, to_disk: bool = False) -> None:
        """Reads and writes the pending lines; on a GPU this waits for their steps.

        Args:
            to_disk: they survive a power failure, too.
        """
        if not self.enabled:
            return
        for step, values in self._pending:
            self._write(step, {name: float(value() if callable(value) else value) for name, value in values.items()})
        self._pending.clear()
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        if self.enabled and not self._file.closed:
            self.flush(to_disk=True)
            self._file.close()
            self._board.close()
            threading.excepthook = self._previous_hook

    def _report(self, failed: threading.ExceptHookArgs) -> None:
        """In the place of `threading.excepthook`: TensorBoard's thread prints no traceback of a disk fault, which the next
        call of its writer raises here."""
        if not isinstance(failed.exc_value, OSError) or as_disk_fault(failed.exc_value, self.folder) is None:
            self._previous_hook(failed)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line: dict[str, Any] = {"step": step, **{name: float(f"{value:.7g}") for name, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def _step_of(line: str) -> int | None:
    """None for a line that a killed process left half-written."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
