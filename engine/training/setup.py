"""DeepSpeed glue: process group, engines, and whole state dicts out of sharded ones.

What is DeepSpeed's stays DeepSpeed's: the config's `deepspeed:` section reaches `deepspeed.initialize` as it stands.
The only thing filled in is the text `auto` at `scheduler.params.total_num_steps`, which is the run's length.
"""

import contextlib
import copy
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from engine.errors import InputError

# How long ranks wait for one another. The default of 10 to 30 minutes ends a run while rank 0 encodes a large set.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        return bool(self.mean(float(flag)) > 0)

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over ranks of 0-d tensors; every rank must give the same names."""
        if self.size == 1 or not values:
            return values
        stacked = torch.stack([value.detach().double() for value in values.values()])
        torch.distributed.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).unbind(), strict=True))

    def mean(self, value: float) -> float:
        """Mean over ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor.item()) / self.size


def join_world(*, torch_threads: int | None) -> World:
    """Joins the process group that `deepspeed`, `torchrun` or plain `python` (one process) started.

    On CPU the gloo backend is used and DeepSpeed's shared-memory all-reduce is left out: it is compiled at first use
    (40 s, and needs a compiler), and wins nothing for the few ranks that one CPU holds.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(torch_threads or max(1, (os.cpu_count() or 1) // local_size))
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
        timeout=_PATIENCE,
        verbose=False,
    )
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return World(rank, size, local_rank, device)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_engine(
    module: nn.Module, settings: dict[str, Any], *, total_steps: int, parameters: Iterable[Any] | None = None
) -> Any:
    """A DeepSpeed engine around `module`.

    Args:
        settings: the config's `deepspeed:` section.
        total_steps: fills in `total_num_steps: auto`.
        parameters: parameter groups; default: everything that requires a gradient.

    Raises:
        InputError: settings that this machine or DeepSpeed refuses.
    """
    settings = copy.deepcopy(settings)
    if settings.get("fp16", {}).get("enabled") and zero_stage(settings) == 0:
        # 0.19 divides gradients by the loss scale there, and scales no loss: they underflow without a word.
        raise InputError(
            "deepspeed.zero_optimization.stage", 0, "DeepSpeed scales no fp16 loss at stage 0: write stage 1 (on one "
            "GPU it takes the same memory), or use bf16"
        )  # fmt: skip
    if settings.get("fp16", {}).get("enabled") and get_accelerator().device_name() == "cpu":
        raise InputError("deepspeed.fp16.enabled", True, "DeepSpeed has no fp16 on CPU: use bf16, or leave both out")
    scheduler = settings.get("scheduler", {}).get("params", {})
    if scheduler.get("total_num_steps") == "auto":
        scheduler["total_num_steps"] = total_steps
    if "optimizer" not in settings:
        raise InputError(
            "deepspeed.optimizer", "(nothing)", "is missing: add one, e.g. {type: AdamW, params: {lr: 3e-4}}"
        )
    if any(settings.get(section, {}).get("enabled") for section in ("bf16", "fp16")):
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = _BatchNormInFloat  # in place: names and weights stay
    groups = list(parameters) if parameters is not None else [p for p in module.parameters() if p.requires_grad]
    try:
        engine, *_ = deepspeed.initialize(model=module, config=settings, model_parameters=groups)
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            "deepspeed", " ".join(lines)[:300], "mend the section; DeepSpeed's documentation applies"
        ) from error
    return engine


def backward_and_step(engine: Any, loss: Tensor) -> None:
    """One micro batch's `engine.backward` and `engine.step`; `engine.get_global_grad_norm()` tells the norm after it.

    DeepSpeed tells none where it wraps no optimiser of its own (float32 without ZeRO), so it is taken here, before
    clipping as everywhere else.
    """
    engine.backward(loss)
    if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "_global_grad_norm"):
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        engine._global_grad_norm = torch.nn.utils.get_total_norm(gradients)  # the attribute that the getter returns
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):  # DeepSpeed's words; it raises no class of its own
            raise
        raise InputError(
            "deepspeed.fp16", "the loss scale is at its minimum", "gradients are inf or nan even so: lower the learning "
            "rate, or use bf16; the last checkpoint is kept"
        ) from error  # fmt: skip


def micro_batch(settings: dict[str, Any]) -> tuple[int, int]:
    """(pictures a micro batch and rank, micro batches a step) of a `deepspeed:` section.

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
    """Of a `deepspeed:` section."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


@contextlib.contextmanager
def whole_parameters(engine: Any) -> Iterator[None]:
    """All parameters in one piece for a block: ZeRO-3 keeps only a shard of each on a rank."""
    parameters = list(engine.module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The module's whole state dict in float32 on the CPU, whatever the ZeRO stage and precision.

    Every rank must call it: under ZeRO each parameter's master copy is gathered from where it lives. Buffers (batch
    norm statistics) are rank 0's.
    """
    module: nn.Module = engine.module
    parameters = dict(module.named_parameters())
    masters = _listed_masters(engine)
    weights = {}
    for name, value in module.state_dict().items():
        parameter = parameters.get(name)
        master = None
        if parameter is not None:
            master = safe_get_full_fp32_param(parameter) if _is_linked(parameter) else masters.get(id(parameter))
        tensor = value if master is None else master
        weights[name] = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().clone()
    return weights


def update_master(engine: Any, parameter: Tensor) -> None:
    """Tells the optimiser of a change made to `parameter`: it steps from its own float32 copy, where it has one."""
    if _is_linked(parameter):
        safe_set_full_fp32_param(parameter, parameter.detach().float().clone())
    elif (master := _listed_masters(engine).get(id(parameter))) is not None:
        with torch.no_grad():
            master.copy_(parameter)


def _is_linked(parameter: Tensor) -> bool:
    """Under ZeRO 1 to 3 a parameter knows where its master copy lives."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _listed_masters(engine: Any) -> dict[int, Tensor]:
    """Master copies by `id` of the parameter, where DeepSpeed keeps lists of them: bf16 and fp16 at ZeRO stage 0."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = optimizer.fp32_groups
    elif isinstance(optimizer, FP16_Optimizer):  # flat: these are views into it
        pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        groups = [_unflatten_dense_tensors(flat, group) for flat, group in pairs]
    else:
        return {}
    return {
        id(low): high
        for lows, highs in zip(optimizer.fp16_groups, groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    }


class _BatchNormInFloat(nn.BatchNorm2d):
    """BatchNorm for bf16 and fp16 engines: DeepSpeed casts weights but no buffers, and torch refuses the mixture."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight.float(), self.bias.float(),
            self.training, self.momentum or 0.0, self.eps,
        )  # fmt: skip
