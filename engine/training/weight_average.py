"""Exponential moving average of the weights (`ema_decay`): smoother than the weights of any one step.

What is averaged are the tensors that torch's optimiser updates: the float32 masters, of which each rank has its part under
ZeRO 1 and 2. Each rank averages its own part and writes it into the checkpoint. For validation, samples and exports the
average takes the weights' place in the engine, and gives it back.

The average follows the weights closely at first: its decay is min(decay, (1 + n) / (10 + n)) at its update n, as in TensorFlow's
ExponentialMovingAverage and timm's ModelEmaV3.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.run import Run
from engine.errors import InputError
from engine.training.engines import DeepSpeedEngine, zero_stage
from engine.training.process_group import World
from engine.training.weights import full_weights


class WeightAverage:
    """The average of one engine's weights; `engine.training.checkpoints.Restorable`, so that checkpoints hold it."""

    def __init__(self, engine: DeepSpeedEngine, decay: float, world: World) -> None:
        self._engine, self._decay, self._rank = engine, decay, world.rank
        self._masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
        self.averages: list[Tensor] = []
        self.updates = 0
        self.checkpoint_engine: Any = engine.checkpoint_engine
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Starts anew from the weights as they are: they were set, and the average is of others."""
        self.averages = [master.detach().float().clone() for master in self._masters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights after an optimiser step."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        for average, master in zip(self.averages, self._masters, strict=True):
            average.lerp_(master.detach().float(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights within the block, in masters and module; every rank must enter it."""
        parameters = dict(self._engine.module.named_parameters())
        own = [value.detach().clone() for value in parameters.values()]
        masters = [master.detach().clone() for master in self._masters]
        with torch.no_grad():
            for master, average in zip(self._masters, self.averages, strict=True):
                master.copy_(average)
            for name, value in full_weights(self._engine).items():
                if name in parameters:
                    parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for master, before in zip(self._masters, masters, strict=True):
                    master.copy_(before)
                for value, before in zip(parameters.values(), own, strict=True):
                    value.copy_(before)

    def save_checkpoint(self, save_dir: str, /, *, tag: str, save_latest: bool) -> object:
        """Writes this rank's part."""
        place = self._file(save_dir, tag)
        place.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoint_engine.save({"averages": self.averages, "updates": self.updates}, str(place))
        return True

    def load_checkpoint(self, load_dir: str, /, *, tag: str) -> tuple[str | None, Any]:
        """Reads this rank's part, which the checkpoint's digests have vouched for."""
        place = self._file(load_dir, tag)
        state = torch.load(place, map_location="cpu", weights_only=True)
        if [average.shape for average in state["averages"]] != [average.shape for average in self.averages]:
            raise ValueError("the average is of weights of other shapes")
        for average, stored in zip(self.averages, state["averages"], strict=True):
            average.copy_(stored)
        self.updates = int(state["updates"])
        return str(place), None

    def _file(self, folder: str, tag: str) -> Path:
        return Path(folder) / tag / f"average-rank-{self._rank:05d}.pt"


def make_average(run: Run, engine: DeepSpeedEngine, world: World) -> WeightAverage | None:
    """The average that a config asks for; None without `ema_decay`.

    Raises:
        InputError: at ZeRO 3, where no rank has whole weights to put the average in place of.
    """
    if run.ema_decay is None:
        return None
    if zero_stage(run.deepspeed) == 3:
        raise InputError("ema_decay", run.ema_decay, "needs whole weights on each rank: write ZeRO stage 0, 1 or 2")
    return WeightAverage(engine, run.ema_decay, world)
