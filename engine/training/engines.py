"""DeepSpeed engines: what training uses of them, and how they are made from a config's `deepspeed:` section.

The section reaches `deepspeed.initialize` as it stands. The only value that is filled in is `auto` at
`scheduler.params.total_num_steps`, which becomes the length of the run.
"""

import copy
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfigError
from torch import Tensor, nn

from engine.errors import InputError
from engine.training.checkpoints import Restorable


class DeepSpeedEngine(Restorable, Protocol):
    """What training uses of `deepspeed.DeepSpeedEngine`."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> object:
        """DeepSpeed's wrapper (ZeRO, bf16, fp16), or torch's optimiser itself (float32 at ZeRO stage 0)."""

    @property
    def basic_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimiser, inside the wrapper or not."""

    @property
    def skipped_steps(self) -> int:
        """Updates that DeepSpeed left out, for gradients that were not finite."""

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The module's forward pass."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self) -> object: ...

    def eval(self) -> object: ...

    def backward(self, loss: Tensor) -> object: ...

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates the weights."""

    def step(self) -> object: ...

    def get_lr(self) -> list[float]: ...

    def get_global_grad_norm(self) -> Tensor | float | None:
        """Of the last update, before clipping; None where DeepSpeed computes none (float32 at ZeRO stage 0)."""


Engines = dict[str, DeepSpeedEngine]


def make_engine(
    module: nn.Module,
    settings: dict[str, Any],
    *,
    total_steps: int,
    parameters: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> DeepSpeedEngine:
    """A DeepSpeed engine around `module`.

    Args:
        settings: the config's `deepspeed:` section.
        total_steps: fills in `total_num_steps: auto`.
        parameters: parameter groups; default: everything that requires a gradient.
        optimizer: made from the section already, in place of DeepSpeed.

    Raises:
        InputError: settings that this machine or DeepSpeed rejects.
    """
    settings = copy.deepcopy(settings)
    if is_fp16(settings) and zero_stage(settings) == 0:
        # 0.19 divides gradients by the loss scale there, and scales no loss: they underflow without a warning.
        raise InputError(
            "deepspeed.zero_optimization.stage", 0, "DeepSpeed scales no fp16 loss at stage 0: write stage 1 (on one "
            "GPU it takes the same memory), or use bf16"
        )  # fmt: skip
    if is_fp16(settings) and get_accelerator().device_name() == "cpu":
        raise InputError("deepspeed.fp16.enabled", True, "DeepSpeed has no fp16 on CPU: use bf16, or leave both out")
    scheduler = settings.get("scheduler", {}).get("params", {})
    if scheduler.get("total_num_steps") == "auto":
        scheduler["total_num_steps"] = total_steps
    if "optimizer" not in settings:
        raise InputError(
            "deepspeed.optimizer", "(nothing)", "is missing: add one, e.g. {type: AdamW, params: {lr: 3e-4}}"
        )
    check_types(settings)
    if is_muon(settings) and optimizer is None:
        raise InputError("deepspeed.optimizer.type", "Muon", "is for the transformer (stage: kodalle): use AdamW here")
    if any(settings.get(section, {}).get("enabled") for section in ("bf16", "fp16")):
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = _BatchNormInFloat  # in place: names and weights stay
    groups = list(parameters) if parameters is not None else [p for p in module.parameters() if p.requires_grad]
    if optimizer is not None:
        del settings["optimizer"]
    try:
        engine, *_ = deepspeed.initialize(model=module, config=settings, model_parameters=groups, optimizer=optimizer)
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            "deepspeed", " ".join(lines)[:300], "mend the section; DeepSpeed's documentation applies"
        ) from error
    made: DeepSpeedEngine = engine
    return made


def check_types(settings: dict[str, Any]) -> None:
    """Raises InputError for an optimiser that is neither DeepSpeed's nor torch's, and for a schedule that waits for a loss."""
    optimizer, scheduler = (settings.get(section, {}).get("type") for section in ("optimizer", "scheduler"))
    known = [name for name in dir(torch.optim) if name[0].isupper()]
    if optimizer is not None and str(optimizer).lower() not in DEEPSPEED_OPTIMIZERS and optimizer not in known:
        near = difflib.get_close_matches(str(optimizer), [*known, "Lamb", "Lion", "Muon"], n=1) or ["AdamW"]
        raise InputError(
            "deepspeed.optimizer.type", optimizer, f"neither DeepSpeed nor torch.optim has it: use {near[0]}, say"
        )
    if scheduler == "ReduceLROnPlateau":
        raise InputError(
            "deepspeed.scheduler.type", scheduler, "waits for a validation loss, and DeepSpeed gives its schedules none: "
            "use WarmupCosineLR"
        )  # fmt: skip


def micro_batch(settings: dict[str, Any]) -> tuple[int, int]:
    """(images a micro batch and rank, micro batches a step) of a `deepspeed:` section.

    Raises:
        InputError: missing, `auto`, or not a positive whole number.
    """
    sizes = []
    for name, default in (("train_micro_batch_size_per_gpu", "(nothing)"), ("gradient_accumulation_steps", 1)):
        value = settings.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"deepspeed.{name}", value, "give a positive whole number, e.g. 32")
        sizes.append(value)
    return sizes[0], sizes[1]


def zero_stage(settings: dict[str, Any]) -> int:
    """ZeRO stage of a `deepspeed:` section."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def is_muon(settings: dict[str, Any]) -> bool:
    """Whether a `deepspeed:` section asks for Muon."""
    return str(settings.get("optimizer", {}).get("type", "")).lower() == "muon"


def is_fp16(settings: dict[str, Any]) -> bool:
    """Whether a `deepspeed:` section trains in fp16, with a scaled loss."""
    return bool(settings.get("fp16", {}).get("enabled"))


class _BatchNormInFloat(nn.BatchNorm2d):
    """BatchNorm for bf16 and fp16 engines: DeepSpeed casts weights but no buffers, and torch rejects the mixture."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight.float(), self.bias.float(),
            self.training, self.momentum or 0.0, self.eps,
        )  # fmt: skip
