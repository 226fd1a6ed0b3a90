"""The check for finite numbers between a backward pass and the update of the weights.

A loss or gradient that is inf or nan never reaches the weights. The verdict is computed on the device. On CPU, and for
optimisers that can only be stopped by the host, it is read before each update. torch's fused optimisers on a GPU take
it as a tensor (`found_inf`, which torch's GradScaler uses) and leave the weights as they are; the host then reads it
in `check` alone, which the trainer calls every few steps and before anything is written. After one bad step every
later update is withheld too, so the weights stay those of the step before.

In fp16 gradients that are not finite are DeepSpeed's matter: it skips the step and lowers the loss scale.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import InputError
from engine.training.engines import DeepSpeedEngine
from engine.training.process_group import World

REMEDY = "lower the learning rate, or set deepspeed.gradient_clipping; the last checkpoint is kept"


@dataclass
class _Watch:
    """What one engine's backward passes left for the next verdict."""

    read_before_update: bool
    losses: list[Tensor] = field(default_factory=list)  # 0-d, one a micro batch
    gradient_norms: list[Tensor] = field(default_factory=list)  # 0-d float32, one a parameter and micro batch
    own_norm: Tensor | None = None


class UpdateGuard:
    """Runs `backward` and `step` of a training's engines and withholds updates that are not finite.

    Args:
        fp16: gradients that are not finite are skipped by DeepSpeed and do not stop the training.
    """

    def __init__(self, world: World, *, fp16: bool) -> None:
        self._world, self._fp16 = world, fp16
        self._step = 0
        self._watches: dict[int, _Watch] = {}
        self._found_bad = torch.zeros((), dtype=torch.float32, device=world.device)  # 1: withhold all updates
        self._first_bad = torch.zeros(3, dtype=torch.float64, device=world.device)  # step, loss, gradient norm

    def watch(self, engine: DeepSpeedEngine) -> None:
        """Registers an engine, once, before its first backward pass."""
        watch = _Watch(read_before_update=not _skips_on_device(engine.basic_optimizer, self._world.device))
        if not watch.read_before_update:
            engine.basic_optimizer.found_inf = self._found_bad  # type: ignore[attr-defined]
        self._watches[id(engine)] = watch

        def note(gradient: Tensor) -> None:
            watch.gradient_norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

        # Not read from `parameter.grad` after the backward pass: ZeRO moves gradients elsewhere during it.
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(note)

    def start_step(self, step: int) -> None:
        """Sets the optimiser step (1-based) that the coming updates belong to."""
        self._step = step

    def backward_and_step(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        """One micro batch's `engine.backward` and `engine.step`.

        Raises:
            InputError: loss or gradients are not finite (where that is read before the update), or fp16's loss scale
                cannot be lowered any further.
        """
        watch = self._watches[id(engine)]
        engine.backward(loss)
        watch.losses.append(loss.detach())
        if engine.is_gradient_accumulation_boundary():
            self._judge(watch)
            if watch.read_before_update:
                self.check()
            if not hasattr(engine.optimizer, "_global_grad_norm"):
                # Before clipping, as in DeepSpeed's wrappers; torch's bare optimiser has none.
                gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
                watch.own_norm = torch.nn.utils.get_total_norm(gradients)
        try:
            engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed's words; it raises no class of its own
                raise
            raise InputError(
                "deepspeed.fp16", "the loss scale is at its minimum", "gradients are inf or nan even so: lower the "
                "learning rate, or use bf16; the last checkpoint is kept"
            ) from error  # fmt: skip

    def gradient_norm(self, engine: DeepSpeedEngine) -> Tensor | float | None:
        """Norm of an engine's last gradients over all parameters and ranks, before clipping; None before any."""
        own = self._watches[id(engine)].own_norm
        return engine.get_global_grad_norm() if own is None else own

    def check(self) -> None:
        """Reads the verdict, for which the host waits on a GPU.

        Raises:
            InputError: names the first step whose loss or gradients were not finite. Equal on all ranks.
        """
        if not bool(self._found_bad):
            return
        step, loss, norm = self._first_bad.tolist()
        bad = [f"{name} {value}" for name, value in (("loss", loss), ("grad_norm", norm)) if not math.isfinite(value)]
        raise InputError("training", f"step {int(step)}: {', '.join(bad)}", REMEDY)

    def _judge(self, watch: _Watch) -> None:
        """Adds one engine's losses and gradients to the verdict, on the device."""
        device = self._world.device
        loss = torch.stack([loss.double() for loss in watch.losses]).sum()
        norms = watch.gradient_norms or [torch.zeros((), dtype=torch.float32, device=device)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        watch.losses.clear()
        watch.gradient_norms.clear()
        loss, norm = self._world.sum_(torch.stack([loss, norm.double()])).unbind()  # inf and nan survive a sum
        bad = ~loss.isfinite() & norm.isfinite() if self._fp16 else ~(loss.isfinite() & norm.isfinite())
        step = torch.full((), float(self._step), dtype=torch.float64, device=device)
        is_first = bad & (self._found_bad == 0)
        self._first_bad.copy_(torch.where(is_first, torch.stack([step, loss, norm]), self._first_bad))
        self._found_bad.logical_or_(bad)


def _skips_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether an optimiser leaves the weights as they are where the tensor `found_inf` is 1, like torch's fused ones."""
    return device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False)
