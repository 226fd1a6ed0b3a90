"""What a run leaves to read: log.jsonl (one line a step), TensorBoard events, sample pictures."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

FLUSH_EVERY = 10  # steps whose scalars stay on the device, so that logging does not wait for it at each step


class RunLog:
    """Writer for one process; every method is a no-op where `enabled` is False (ranks other than 0).

    A resumed run first cuts the lines of steps that it will do again, so that each step stands there once.
    """

    def __init__(self, folder: Path, *, resume_step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.folder = folder
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
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
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: dict[str, Tensor | float]) -> None:
        """One line of log.jsonl for optimiser step `step` (1-based: steps done); tensors are read later, together."""
        if not self.enabled:
            return
        self._pending.append((step, values))
        if len(self._pending) >= FLUSH_EVERY:
            self.flush()

    def validation(self, step: int, values: dict[str, float]) -> None:
        """A line of its own, names prefixed with `validation_`."""
        if self.enabled:
            self.flush()
            self._write(step, {f"validation_{name}": value for name, value in values.items()})
            self._file.flush()
            self._board.flush()

    def picture(self, step: int, picture: Image.Image) -> None:
        """samples/step-<n>.png and the same in TensorBoard."""
        if not self.enabled:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        picture.save(self.folder / "samples" / f"step-{step:08d}.png")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        self._board.add_image("samples", pixels.view(picture.height, picture.width, 3), step, dataformats="HWC")

    def flush(self) -> None:
        """Writes the pending lines."""
        if not self.enabled:
            return
        for step, values in self._pending:
            self._write(step, {name: float(value) for name, value in values.items()})
        self._pending.clear()
        self._file.flush()

    def close(self) -> None:
        """Writes what is pending; a second call does nothing."""
        if self.enabled and not self._file.closed:
            self.flush()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._board.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
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
