"""The one training loop. What differs between VQGAN, KoCLIP and KoDALLE is a stage; what is alike is here.

A stage knows what a batch is and what the loss is. `step` counts finished optimiser steps; step s is made of micro
batches s * accumulation … and every random number in it is a function of (seed, s), so that a run killed at any
moment goes on, from its newest complete checkpoint, to the same losses (bit for bit on CPU).
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from engine.config import KoclipRun, KodalleRun, Run, VqganRun
from engine.config_files import dump_yaml
from engine.errors import InputError
from engine.files import atomic_file
from engine.measure import count_flops, matrix_peak, synchronize
from engine.progress import ProgressBar, seconds_text
from engine.training import checkpoints
from engine.training.batches import Batch, BatchSource, stream
from engine.training.card import model_card
from engine.training.checkpoints import Progress
from engine.training.deepspeed_section import check_keys
from engine.training.resumption import check_folder
from engine.training.run_log import RunLog
from engine.training.setup import World, join_world, micro_batch


class Stage(Protocol):
    """One kind of training. Built before the process group's engines, so that bad input stops it early."""

    name: str
    num_train: int  # pictures in the training split
    num_validation: int
    source: BatchSource
    validation_source: BatchSource | None

    def build(self, total_steps: int) -> dict[str, Any]:
        """Makes the DeepSpeed engines; the first one's learning rate and gradient norm are logged."""

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Forward, backward and engine steps of one micro batch; returns 0-d tensors to log."""

    def after_step(self, step: int) -> None:
        """Called after optimiser step number `step` (1-based)."""

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Means over held-out batches, equal on all ranks; `loss` decides which model is best."""

    def sample(self, count: int) -> Image.Image:
        """A picture that shows where training stands; all ranks call it."""

    def export(self, folder: Path, card: str) -> None:
        """Writes a model folder; all ranks call it."""

    def state(self) -> dict[str, Tensor]:
        """What the stage remembers besides its engines."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class _Clock:
    """What a step costs, for the log."""

    peak_flops: float
    flops_per_step: float = 0.0


def train(run: Run) -> Path:
    """Trains, resuming where the run stood.

    Returns:
        The exported model folder, `<run>/model`; the one with the lowest validation loss is `<run>/model-best`.

    Raises:
        InputError: anything a user can get wrong, before the first step where it can be known then.
    """
    begun = time.monotonic()
    world = join_world(torch_threads=run.loop.torch_threads)
    torch.manual_seed(run.seed)
    check_keys(run.deepspeed)
    batch_size, accumulation = micro_batch(run.deepspeed)
    check_folder(run)
    stage = _make_stage(run, world)
    total = _total_steps(run, stage, batch_size * accumulation * world.size)
    engines = stage.build(total)
    if world.is_main:
        with atomic_file(run.run / "config.yaml") as temporary:
            temporary.write_text(dump_yaml(run), encoding="utf-8")
    progress = _resume(run, stage, engines, world)
    if progress.step >= total and (run.run / "model").is_dir():
        if world.is_main:
            print(f"{run.run} is finished ({progress.step} steps): nothing to do", flush=True)
        return run.run / "model"
    log = RunLog(run.run, resume_step=progress.step, enabled=world.is_main)
    try:
        progress = _run_steps(run, stage, engines, progress, total, accumulation, world, log)
    finally:
        log.close()
    stage.export(run.run / "model", model_card(run, progress, run.run / "log.jsonl" if world.is_main else None))
    if world.is_main:
        print(f"{run.run / 'model'} written after {seconds_text(time.monotonic() - begun)}", flush=True)
    return run.run / "model"


def _run_steps(
    run: Run,
    stage: Stage,
    engines: dict[str, Any],
    progress: Progress,
    total: int,
    accumulation: int,
    world: World,
    log: RunLog,
) -> Progress:
    loop = run.loop
    main = next(iter(engines.values()))
    clock = _Clock(matrix_peak(world.device, _matrix_dtype(main)))
    pictures = micro_batch(run.deepspeed)[0] * accumulation * world.size
    batches = stream(stage.source, progress.step * accumulation, total * accumulation, num_workers=run.data.num_workers)
    skipped_in_a_row, skipped_before = 0, _skipped(engines)
    with ProgressBar(stage.name, total=total, start=progress.step, enabled=world.is_main) as bar, _StopSignal() as stop:
        while progress.step < total:
            begun = time.perf_counter()
            torch.manual_seed(run.seed * 1_000_003 + progress.step * world.size + world.rank)  # dropout of this step
            scalars = _one_step(stage, batches, progress.step, accumulation, clock, world)
            progress = replace(progress, step=progress.step + 1)
            stage.after_step(progress.step)
            synchronize(
                world.device
            )  # _check_finite would wait here anyway; the time must be the work's, not its launch's
            seconds = time.perf_counter() - begun
            skipped = _skipped(engines)
            skipped_in_a_row = skipped_in_a_row + 1 if skipped > skipped_before else 0
            skipped_before = skipped
            if progress.step % loop.log_every == 0:
                scalars = world.means(scalars)
                _log_step(log, progress.step, scalars, main, engines, seconds, pictures, clock)
            excused = skipped_in_a_row > 0 and bool(run.deepspeed.get("fp16", {}).get("enabled"))
            _check_finite(progress.step, scalars, main, skipped_in_a_row > 0, excused, world)
            if skipped_in_a_row >= loop.max_skipped_steps:
                raise InputError(
                    "training", f"{skipped_in_a_row} steps in a row", "had inf or nan gradients and were skipped: "
                    "lower the learning rate or the loss scale; the last checkpoint is kept"
                )  # fmt: skip
            last = progress.step == total
            if last or progress.step % loop.validate_every == 0:
                progress = _validate(run, stage, engines, progress, log, world)
            if last or progress.step % loop.sample_every == 0:
                _sample(run, stage, engines, progress.step, log)
            stopping = world.any(stop.received)
            if last or stopping or progress.step % loop.checkpoint_every == 0:
                _check_weights(progress.step, engines, world)
                log.flush()  # a resumed run goes on from here: the lines up to here must not die with this process
                checkpoints.save(
                    run.run / "checkpoints", progress, engines, stage.state(), world=world, keep=loop.keep_checkpoints
                )
            bar.update(progress.step, _note(scalars) if bar.enabled else "")
            if stopping and not last:
                raise SystemExit(f"stopped by a signal after step {progress.step}; run the same command to go on")
    return progress


def _one_step(
    stage: Stage, batches: Iterator[Batch], step: int, accumulation: int, clock: _Clock, world: World
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for _ in range(accumulation):
        batch = _next_batch(batches, world)
        work: Callable[[], dict[str, Tensor]] = lambda batch=batch: stage.micro_step(batch, step)  # type: ignore[misc]
        if clock.flops_per_step == 0:
            scalars, flops = count_flops(work)
            clock.flops_per_step = float(flops) * accumulation
        else:
            scalars = work()
        for name, value in scalars.items():
            sums[name] = sums[name] + value if name in sums else value
    return {name: value / accumulation for name, value in sums.items()}


def _next_batch(batches: Iterator[Batch], world: World) -> Batch:
    """A picture that cannot be read is one rank's trouble alone, and train.py prints rank 0's errors only."""
    try:
        return next(batches)
    except InputError as error:
        if not world.is_main:
            print(f"error (rank {world.rank}): {error}", file=sys.stderr, flush=True)
        raise


def _check_finite(step: int, scalars: dict[str, Tensor], main: Any, skipped: bool, excused: bool, world: World) -> None:
    """Stops before a checkpoint is made of nan weights.

    Args:
        skipped: DeepSpeed left the step out for gradients that are not finite.
        excused: that does happen: fp16 tries a loss scale that is too high.
    """
    norm = main.get_global_grad_norm()
    watched = {"loss": float(scalars["loss"]), "grad_norm": 0.0 if norm is None else float(norm)}
    bad = [f"{name} {value}" for name, value in watched.items() if not math.isfinite(value)]
    if world.any((bool(bad) or skipped) and not excused):
        raise InputError(
            "training", f"step {step}: {', '.join(bad) or 'gradients not finite'}",
            "lower the learning rate, or set deepspeed.gradient_clipping; the last checkpoint is kept"
        )  # fmt: skip


def _check_weights(step: int, engines: dict[str, Any], world: World) -> None:
    """Before a checkpoint: a finite loss can have infinite gradients, and DeepSpeed tells no norm at ZeRO 0 in float32."""
    sums = [weight.detach().float().sum() for engine in engines.values() for weight in engine.module.parameters()]
    if world.any(not bool(torch.stack(sums).isfinite().all())):
        raise InputError(
            "training", f"step {step}: weights are no longer finite", "lower the learning rate, or set "
            "deepspeed.gradient_clipping; the last checkpoint is kept"
        )  # fmt: skip


def _log_step(
    log: RunLog,
    step: int,
    scalars: dict[str, Tensor],
    main: Any,
    engines: dict[str, Any],
    seconds: float,
    pictures: int,
    clock: _Clock,
) -> None:
    if not log.enabled:
        return
    values: dict[str, Tensor | float] = dict(scalars)
    values["lr"] = float(main.get_lr()[0])
    norm = main.get_global_grad_norm()
    if norm is not None:
        values["grad_norm"] = norm if isinstance(norm, Tensor) else float(norm)
    scale = getattr(main.optimizer, "cur_scale", None) or getattr(main.optimizer, "loss_scale", None)
    values["loss_scale"] = float(scale) if scale else 1.0
    values["skipped_steps"] = float(_skipped(engines))
    values["images_per_s"] = pictures / seconds
    values["share_of_peak"] = clock.flops_per_step / seconds / clock.peak_flops
    if main.device.type == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated(main.device) / 2**30
    log.scalars(step, values)


def _validate(
    run: Run, stage: Stage, engines: dict[str, Any], progress: Progress, log: RunLog, world: World
) -> Progress:
    """Measures on held-out pictures; exports `model-best` when the loss is the lowest so far."""
    if stage.validation_source is None:
        return progress
    whole = stage.num_validation // (micro_batch(run.deepspeed)[0] * world.size)  # no picture twice
    batches = [stage.validation_source(number) for number in range(max(1, min(run.loop.validation_batches, whole)))]
    with _eval_mode(engines):
        values = stage.validate(batches)
    log.validation(progress.step, values)
    if progress.best_loss is None or values["loss"] < progress.best_loss:
        progress = replace(progress, best_loss=values["loss"], best_step=progress.step)
        log.flush()
        stage.export(
            run.run / "model-best", model_card(run, progress, run.run / "log.jsonl" if world.is_main else None)
        )
    return progress


def _sample(run: Run, stage: Stage, engines: dict[str, Any], step: int, log: RunLog) -> None:
    with _eval_mode(engines):
        log.picture(step, stage.sample(run.loop.sample_count))


class _eval_mode:
    """Engines in eval mode for a block."""

    def __init__(self, engines: dict[str, Any]) -> None:
        self._engines = engines

    def __enter__(self) -> None:
        for engine in self._engines.values():
            engine.eval()

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.train()


class _StopSignal:
    """Remembers SIGTERM and SIGINT instead of dying of them; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._old[number])


def _make_stage(run: Run, world: World) -> Stage:
    # A closed list: configs that name classes to import are a way to run foreign code.
    if isinstance(run, VqganRun):
        from engine.training.stage_vqgan import VqganStage

        return VqganStage(run, world)
    if isinstance(run, KoclipRun):
        from engine.training.stage_koclip import KoclipStage

        return KoclipStage(run, world)
    assert isinstance(run, KodalleRun), type(run)
    from engine.training.stage_kodalle import KodalleStage

    return KodalleStage(run, world)


def _total_steps(run: Run, stage: Stage, pictures_per_step: int) -> int:
    if run.loop.steps is not None:
        return run.loop.steps
    assert run.loop.epochs is not None
    return max(1, round(run.loop.epochs * stage.num_train / pictures_per_step))


def _resume(run: Run, stage: Stage, engines: dict[str, Any], world: World) -> Progress:
    found = checkpoints.complete_checkpoints(run.run / "checkpoints")
    world.barrier()
    if not found:
        return Progress()
    progress, state = checkpoints.load(found[0], engines, world=world)
    stage.load_state(state)
    if world.is_main:
        print(f"resuming {run.run} at step {progress.step}", flush=True)
    return progress


def _skipped(engines: dict[str, Any]) -> int:
    return sum(int(engine.skipped_steps) for engine in engines.values())


def _matrix_dtype(engine: Any) -> torch.dtype:
    return next(engine.module.parameters()).dtype


def _note(scalars: dict[str, Tensor]) -> str:
    shown = [f"{name} {float(scalars[name]):.3f}" for name in ("loss", "loss_text", "loss_image") if name in scalars]
    return "  ".join(shown)
