"""The training loop, the same for VQGAN, dVAE, KoCLIP and KoDALLE; what differs between them is a stage.

`step` counts finished optimiser steps. Step s is made of the micro batches from s * accumulation on, and every random
number in it is a function of (seed, s), so that a run killed at any moment resumes from its newest complete checkpoint
to the same losses (bit for bit on CPU).

On a GPU the host runs ahead of the device: it waits only where the log is written (every `FLUSH_EVERY` steps) and
before anything else is.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config.run import Run
from engine.config_files import dump_yaml
from engine.config_folders import check_folders
from engine.errors import InputError
from engine.files import atomic_file, named_disk_faults
from engine.folder_lock import hold_lock
from engine.measure import count_flops, matrix_peak
from engine.progress import ProgressBar, seconds_text
from engine.training import checkpoints
from engine.training.batches import Batch, stream
from engine.training.card import model_card
from engine.training.checkpoints import Restorable, TrainingProgress
from engine.training.deepspeed_section import check_defaults, check_keys
from engine.training.engines import Engines, is_fp16, micro_batch
from engine.training.muon import check_muon
from engine.training.power_sgd import compress_gradients
from engine.training.process_group import World, join_world
from engine.training.resumption import check_folder, check_inputs
from engine.training.run_log import FLUSH_EVERY, RunLog
from engine.training.stage import Stage, make_stage
from engine.training.step_clock import SlowSteps, StepClock
from engine.training.stop_signal import StopSignal
from engine.training.update_guard import REMEDY, UpdateGuard
from engine.training.weight_average import make_average


def train(run: Run) -> Path:
    """Trains a run, resuming at the newest checkpoint in its folder.

    Returns:
        The exported model folder, `<run>/model`; the one with the lowest validation loss is `<run>/model-best`.

    Raises:
        InputError: anything a user can get wrong, before the first step where it can be known then.
        SystemExit: 128 + the number of the signal that stopped the run, after its checkpoint.
    """
    started_s = time.monotonic()
    world = join_world(torch_threads=run.loop.torch_threads)
    torch.manual_seed(run.seed)
    check_keys(run.deepspeed)
    check_defaults(run.deepspeed, processes=world.size)
    check_muon(run.deepspeed)
    micro_batch(run.deepspeed)  # raises for wrong sizes before any data is read
    with (
        named_disk_faults(run.run, kept="no checkpoint is lost: then run the same command to go on"),
        hold_lock(run.run / ".lock", field="run") if world.is_main else contextlib.nullcontext(),
    ):
        check_folder(run)
        inputs = check_inputs(run) if world.is_main else {}
        check_folders(run)
        return Trainer(run, make_stage(run, world), world, inputs=inputs, started_s=started_s).train()


class Trainer:
    """One training of a stage on this rank; all ranks run the same steps.

    Args:
        stage: its data is read; its engines are built here.
        inputs: digests of what the run learns from, on rank 0.
        started_s: `time.monotonic()` at the start, for the duration that is printed at the end.
    """

    def __init__(self, run: Run, stage: Stage, world: World, *, inputs: dict[str, str], started_s: float) -> None:
        self.run, self.stage, self.world = run, stage, world
        self._inputs = inputs
        self._started_s = started_s
        batch_size, self.accumulation = micro_batch(run.deepspeed)
        self.micro_batch_size = batch_size * world.size  # images of all ranks
        self.images_per_step = self.micro_batch_size * self.accumulation
        self.total_steps = _total_steps(run, stage.num_train, self.images_per_step)
        self.progress = TrainingProgress()
        self.guard = UpdateGuard(world, fp16=is_fp16(run.deepspeed))
        self.engines: Engines = stage.build(self.total_steps, self.guard)
        for engine in self.engines.values():
            self.guard.watch(engine)
        self.main = next(iter(self.engines.values()))
        self.average = make_average(run, self.main, world)
        self._compressions = compress_gradients(run, self.engines, world)
        self._clock = StepClock(world.device)
        self._slow_steps = SlowSteps()
        self._flops_per_step = 0.0  # counted in the first step
        self._skipped = 0  # steps, by DeepSpeed
        self._skipped_in_a_row = 0

    def train(self) -> Path:
        """All steps that are left, then the export; see `train` of this module."""
        run, world = self.run, self.world
        model = run.run / "model"
        self._resume()
        if world.is_main:
            with atomic_file(run.run / "config.yaml") as temporary:
                temporary.write_text(dump_yaml(run), encoding="utf-8")
        if self.progress.step >= self.total_steps and model.is_dir():
            if world.is_main:
                print(f"{run.run} is finished ({self.progress.step} steps): nothing to do", flush=True)
            return model
        log = RunLog(run.run, resume_step=self.progress.step, enabled=world.is_main)
        try:
            self._run_steps(log)
        finally:
            log.close()
        with self._averaged():
            self.stage.export(model, self._card())
        if world.is_main:
            print(f"{model} written after {seconds_text(time.monotonic() - self._started_s)}", flush=True)
        return model

    def _resume(self) -> None:
        found = checkpoints.resume(self.run.run / "checkpoints", self._restorable(), world=self.world)
        if found is None:
            return
        self.progress, state = found
        self.stage.load_state(state)
        if self.world.is_main:
            print(f"resuming {self.run.run} at step {self.progress.step}", flush=True)

    def _run_steps(self, log: RunLog) -> None:
        world, loop, total = self.world, self.run.loop, self.total_steps
        self._skipped = self._count_skipped()
        peak_flops = matrix_peak(world.device, next(self.main.module.parameters()).dtype)
        first, last = self.progress.step * self.accumulation, total * self.accumulation
        batches = stream(self.stage.source, first, last, num_workers=self.run.data.num_workers)
        with (
            ProgressBar(self.stage.name, total=total, start=self.progress.step, enabled=world.is_main) as bar,
            StopSignal() as stop,
        ):
            while self.progress.step < total:
                self._clock.start()
                scalars = self._step(batches)
                seconds = self._clock.stop()
                self._slow_steps.add(self.progress.step, seconds)
                step, is_last = self.progress.step, self.progress.step == total
                if step % loop.log_every == 0:
                    scalars = world.means(scalars)
                    self._log_step(log, scalars, seconds, peak_flops)
                self._check_skipped()
                stopping = world.max(stop.received)
                validates = is_last or step % loop.validate_every == 0
                samples = is_last or (step % loop.sample_every == 0 and not stopping)
                saves = is_last or step % loop.checkpoint_every == 0 or bool(stopping)
                if world.device.type == "cpu" or step % FLUSH_EVERY == 0 or validates or samples or saves:
                    self.guard.check()
                    bar.update(step, _note(scalars) if bar.enabled else "")
                    for line in self._slow_steps.reports() if world.is_main else ():
                        print(line, flush=True)
                if step % FLUSH_EVERY == 0:
                    log.flush()
                if validates:
                    self._validate(log)
                if samples:
                    self._sample(log)
                if validates or samples:  # they take their time
                    stopping = stopping or world.max(stop.received)
                if saves or stopping:
                    self._save(log)
                if stopping and not is_last:
                    if world.is_main:
                        print(f"stopped at step {step}: run the same command to go on", file=sys.stderr, flush=True)
                    world.barrier()  # a launcher ends the others when the first one ends
                    raise SystemExit(128 + stopping)

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step; means over its micro batches of what the stage logs."""
        number = self.progress.step
        torch.manual_seed(self.run.seed * 1_000_003 + number * self.world.size + self.world.rank)  # dropout
        self.guard.start_step(number + 1)
        sums: dict[str, Tensor] = {}
        for _ in range(self.accumulation):
            batch = self._next_batch(batches)
            work = functools.partial(self.stage.micro_step, batch, number)
            if self._flops_per_step == 0:
                scalars, flops = count_flops(work)
                self._flops_per_step = float(flops) * self.accumulation
            else:
                scalars = work()
            for name, value in scalars.items():
                sums[name] = sums[name] + value if name in sums else value
        self.progress = replace(self.progress, step=number + 1)
        weights_were_set = self.stage.after_step(number + 1)
        if self.average is not None:
            self.average.update()
            if weights_were_set:
                self.average.restart()
        return {name: value / self.accumulation for name, value in sums.items()}

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; an image that cannot be read fails on one rank alone, and train.py prints rank 0's errors."""
        try:
            return next(batches)
        except InputError as error:
            if not self.world.is_main:
                print(f"error (rank {self.world.rank}): {error}", file=sys.stderr, flush=True)
            raise

    def _log_step(
        self, log: RunLog, scalars: dict[str, Tensor], seconds: Callable[[], float], peak_flops: float
    ) -> None:
        if not log.enabled:
            return
        values: dict[str, Tensor | float | Callable[[], float]] = dict(scalars)
        values["lr"] = float(self.main.get_lr()[0])
        norm = self.guard.gradient_norm(self.main)
        if norm is not None:
            values["grad_norm"] = norm if isinstance(norm, Tensor) else float(norm)
        optimizer = self.main.optimizer
        scale = getattr(optimizer, "cur_scale", None) or getattr(optimizer, "loss_scale", None)
        values["loss_scale"] = float(scale) if scale else 1.0
        values["skipped_steps"] = float(self._count_skipped())
        values["images_per_s"] = lambda: self.images_per_step / seconds()
        values["share_of_peak"] = lambda: self._flops_per_step / seconds() / peak_flops
        if self.world.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        log.scalars(self.progress.step, values)

    def _check_skipped(self) -> None:
        """Stops over gradients that were not finite, so that DeepSpeed skipped the step.

        In fp16 only over many in a row: now and then it tries a loss scale that is too high.
        """
        skipped, before = self._count_skipped(), self._skipped
        self._skipped = skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped > before else 0
        if self._skipped_in_a_row and not is_fp16(self.run.deepspeed):
            raise InputError("training", f"step {self.progress.step}: gradients not finite", REMEDY)
        if self._skipped_in_a_row >= self.run.loop.max_skipped_steps:
            raise InputError(
                "training", f"{self._skipped_in_a_row} steps in a row", "had inf or nan gradients and were skipped: "
                "lower the learning rate or the loss scale; the last checkpoint is kept"
            )  # fmt: skip

    def _count_skipped(self) -> int:
        return sum(engine.skipped_steps for engine in self.engines.values())

    def _check_weights(self) -> None:
        """Stops over weights that are no longer finite: finite gradients at a high learning rate can make them so."""
        sums = [
            weight.detach().float().sum() for engine in self.engines.values() for weight in engine.module.parameters()
        ]
        if self.world.any(not bool(torch.stack(sums).isfinite().all())):
            raise InputError("training", f"step {self.progress.step}: weights are no longer finite", REMEDY)

    def _validate(self, log: RunLog) -> None:
        """Measures on held-out images; exports `model-best` when the loss is the lowest so far."""
        stage, run = self.stage, self.run
        if stage.validation_source is None:
            return
        whole = stage.num_validation // self.micro_batch_size  # batches in which no image comes twice
        batches = [stage.validation_source(number) for number in range(max(1, min(run.loop.validation_batches, whole)))]
        with self._eval_mode(), self._averaged():
            values = stage.validate(batches)
        log.validation(self.progress.step, values)
        if self.progress.best_loss is None or values["loss"] < self.progress.best_loss:
            self.progress = replace(self.progress, best_loss=values["loss"], best_step=self.progress.step)
            log.flush()
            with self._averaged():
                stage.export(run.run / "model-best", self._card())

    def _sample(self, log: RunLog) -> None:
        with self._eval_mode(), self._averaged():
            log.image(self.progress.step, self.stage.sample(self.run.loop.sample_count))

    def _save(self, log: RunLog) -> None:
        self._check_weights()
        log.flush(to_disk=True)  # a resumed run goes on from here: the lines up to here must not be lost
        checkpoints.save(
            self.run.run / "checkpoints", self.progress, self._restorable(), self.stage.state(),
            world=self.world, keep=self.run.loop.keep_checkpoints, inputs=self._inputs,
        )  # fmt: skip

    def _restorable(self) -> dict[str, Restorable]:
        """What a checkpoint holds: the engines, the average of the weights, errors of compressed gradients."""
        average = {"average": self.average} if self.average is not None else {}
        return {**self.engines, **average, **self._compressions}

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _card(self) -> str:
        log = self.run.run / "log.jsonl" if self.world.is_main else None
        return model_card(self.run, self.progress, log, ground=self.stage.ground)

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Engines in eval mode within the block."""
        for engine in self.engines.values():
            engine.eval()
        try:
            yield
        finally:
            for engine in self.engines.values():
                engine.train()


def _total_steps(run: Run, num_train: int, images_per_step: int) -> int:
    if run.loop.steps is not None:
        return run.loop.steps
    assert run.loop.epochs is not None
    return max(1, round(run.loop.epochs * num_train / images_per_step))


def _note(scalars: dict[str, Tensor]) -> str:
    shown = [f"{name} {float(scalars[name]):.3f}" for name in ("loss", "loss_text", "loss_image") if name in scalars]
    return "  ".join(shown)
