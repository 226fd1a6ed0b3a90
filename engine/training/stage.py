"""What differs between the trainings of VQGAN, dVAE, KoCLIP and KoDALLE; everything else is the trainer's."""

from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from engine.config.run import Run
from engine.config.stages import DvaeRun, KoclipRun, KodalleRun, VqganRun
from engine.training.batches import Batch, BatchSource
from engine.training.engines import Engines
from engine.training.process_group import World
from engine.training.update_guard import UpdateGuard


class Stage(Protocol):
    """One kind of training: its data, its model and its loss.

    The constructor reads the data, so that bad input stops a run before any model is built.
    """

    name: str
    num_train: int  # images in the training split
    num_validation: int
    ground: str | None  # `#rrggbb` around the objects in its images, if they are cut-outs; goes into what it exports
    source: BatchSource
    validation_source: BatchSource | None

    def build(self, total_steps: int, guard: UpdateGuard) -> Engines:
        """DeepSpeed engines; the trainer logs the learning rate and gradient norm of the first one."""

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Forward, backward and engine steps of one micro batch, by the guard; returns 0-d tensors to log, with `loss`.

        Args:
            step: optimiser steps done before this one.
        """

    def after_step(self, step: int) -> bool:
        """Called after optimiser step number `step` (1-based); whether weights were set in it by other means than the step."""

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Means over held-out batches, equal on all ranks; the model with the lowest `loss` is the best."""

    def sample(self, count: int) -> Image.Image:
        """An image that shows the state of training; all ranks call it."""

    def export(self, folder: Path, card: str) -> None:
        """Writes a model folder; all ranks call it."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the engines' states."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""


def make_stage(run: Run, world: World) -> Stage:
    """The stage of a run's config. A closed list: configs that name classes to import are a way to run foreign code."""
    if isinstance(run, VqganRun):
        from engine.training.stage_vqgan import VqganStage

        return VqganStage(run, world)
    if isinstance(run, DvaeRun):
        from engine.training.stage_dvae import DvaeStage

        return DvaeStage(run, world)
    if isinstance(run, KoclipRun):
        from engine.training.stage_koclip import KoclipStage

        return KoclipStage(run, world)
    assert isinstance(run, KodalleRun), type(run)
    from engine.training.stage_kodalle import KodalleStage

    return KodalleStage(run, world)
