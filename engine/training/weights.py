"""Whole float32 weights of a DeepSpeed engine, whatever its ZeRO stage and precision, and changes to them.

DeepSpeed keeps the float32 copies that the optimiser updates ("master weights") in other places for each mode: beside
each parameter under ZeRO 1 to 3, in lists of its optimiser for bf16 and fp16 without ZeRO, nowhere in float32.
"""

import contextlib
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor

from engine.training.engines import DeepSpeedEngine


@contextlib.contextmanager
def gathered_parameters(engine: DeepSpeedEngine) -> Iterator[None]:
    """All parameters in one piece within the block: ZeRO-3 keeps only a shard of each on a rank."""
    parameters = list(engine.module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


def full_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """State dict of the module in float32 on the CPU.

    Every rank must call it: under ZeRO each parameter's master weights are gathered from the ranks that hold them.
    Buffers (batch norm statistics) are rank 0's.
    """
    parameters = dict(engine.module.named_parameters())
    masters = _listed_masters(engine)
    weights = {}
    for name, value in engine.module.state_dict().items():
        parameter = parameters.get(name)
        master = None
        if parameter is not None:
            master = safe_get_full_fp32_param(parameter) if _is_linked(parameter) else masters.get(id(parameter))
        tensor = value if master is None else master
        weights[name] = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().clone()
    return weights


def update_master(engine: DeepSpeedEngine, parameter: Tensor) -> None:
    """Copies a parameter that was changed in place into its master weights, from which the optimiser goes on."""
    if _is_linked(parameter):
        safe_set_full_fp32_param(parameter, parameter.detach().float().clone())
    elif (master := _listed_masters(engine).get(id(parameter))) is not None:
        with torch.no_grad():
            master.copy_(parameter)


def _is_linked(parameter: Tensor) -> bool:
    """Under ZeRO 1 to 3 a parameter has a reference to its master weights."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _listed_masters(engine: DeepSpeedEngine) -> dict[int, Tensor]:
    """Master weights by `id` of the parameter, where DeepSpeed keeps lists of them: bf16 and fp16 at ZeRO stage 0."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = optimizer.fp32_groups
    elif isinstance(optimizer, FP16_Optimizer):  # one flat tensor a group: these are views into it
        pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        groups = [_views(flat, group) for flat, group in pairs]
    else:
        return {}
    return {
        id(low): high
        for lows, highs in zip(optimizer.fp16_groups, groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    }


def _views(flat: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Consecutive pieces of a flat tensor in the shapes of `parameters`."""
    pieces = flat.split([parameter.numel() for parameter in parameters])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]
