"""Muon for the matrices of the layers, AdamW for everything else: DeepSpeed's `optimizer: {type: Muon}`.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest matrix whose
singular values are about equal, by five Newton-Schulz steps, so that a step moves all directions alike. It is for the
matrices between layers; tables, head, biases, norms and scales are AdamW's, at a rate of its own:

    optimizer: {type: Muon, params: {lr: 0.02, adam_lr: 1.0e-3, momentum: 0.95, weight_decay: 0.05, betas: [0.9, 0.98]}}

The optimiser is DeepSpeed 0.19's, but made here. From the section alone DeepSpeed would decide by names, and give Muon
the head as well. What it gets wrong with other settings is refused by `check_muon`.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engine.errors import InputError
from engine.training.engines import is_fp16, is_muon, zero_stage

_RATES = ("lr", "adam_lr")
_PARAMS = (*_RATES, "momentum", "ns_method", "weight_decay", "betas", "eps")


def check_muon(settings: dict[str, Any]) -> None:
    """Refuses what Muon cannot do in a `deepspeed:` section; other optimisers pass.

    Raises:
        InputError: ZeRO 3, offloading, fp16, clipping at ZeRO 1 or 2, a scheduler that knows one rate only, or an
            unknown or missing parameter.
    """
    if not is_muon(settings):
        return
    zero = settings.get("zero_optimization", {})
    if zero_stage(settings) == 3:
        raise InputError("deepspeed.zero_optimization.stage", 3, "Muon needs whole matrices: write 0, 1 or 2")
    if zero.get("offload_optimizer") or zero.get("cpu_offload"):
        raise InputError("deepspeed.zero_optimization.offload_optimizer", "set", "not with Muon: leave it out")
    if is_fp16(settings):
        raise InputError("deepspeed.fp16.enabled", True, "Muon is tried in bf16 and float32 only: use one of these")
    clipping = settings.get("gradient_clipping", "(nothing, which is 1.0)")
    if zero_stage(settings) > 0 and clipping != 0:
        # 0.19 takes the norm after Newton-Schulz, where it is that of orthogonal matrices however small gradients are.
        raise InputError(
            "deepspeed.gradient_clipping", clipping,
            "at ZeRO 1 and 2 DeepSpeed would clip Muon's updates instead of gradients: write 0, or ZeRO stage 0"
        )  # fmt: skip
    scheduler = settings.get("scheduler", {}).get("type")
    if scheduler not in (None, "WarmupCosineLR"):
        raise InputError(
            "deepspeed.scheduler.type", scheduler, "gives all parameters one rate, and Muon has two: use WarmupCosineLR"
        )
    params = settings["optimizer"].get("params", {})
    for name in params:
        if name not in _PARAMS:
            near = difflib.get_close_matches(str(name), _PARAMS, n=1) or _PARAMS
            raise InputError(f"deepspeed.optimizer.params.{name}", params[name], f"Muon has {', '.join(near)}")
    for name in _RATES:
        if not isinstance(params.get(name), int | float) or not params[name] > 0:
            raise InputError(
                f"deepspeed.optimizer.params.{name}", params.get(name, "(nothing)"),
                "give a positive number: lr is Muon's rate (0.02), adam_lr that of the other parameters (1e-3)"
            )  # fmt: skip


def make_muon(
    matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], params: dict[str, Any], *, decay_others: bool
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over `matrices`, with torch's AdamW over `others`.

    Args:
        params: of the `optimizer:` section, checked by `check_muon`.
        decay_others: whether `weight_decay` is theirs as well.

    Raises:
        InputError: a value that DeepSpeed does not accept.
    """
    # On first use: importing it loads torch's compiler, some 5 s.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    # DeepSpeed compiles Newton-Schulz with torch.compile. On a CPU that needs a C++ compiler, takes 15 to 90 s and gains
    # nothing (four matrices of a layer of 256: 37 ms without, 55 ms with); on a GPU it was not tried.
    torch.compiler.set_stance("force_eager")
    for parameter in matrices:
        parameter.use_muon = True  # type: ignore[attr-defined] # what ZeRO 1 and 2 go by
    for parameter in others:
        parameter.use_muon = False  # type: ignore[attr-defined]
    ours: dict[str, Any] = {
        name: params[name] for name in ("lr", "momentum", "ns_method", "weight_decay") if name in params
    }
    theirs: dict[str, Any] = {name: params[name] for name in ("betas", "eps") if name in params}
    if "weight_decay" in params and decay_others:
        theirs["weight_decay"] = params["weight_decay"]
    groups: list[dict[str, Any]] = [
        {"params": list(matrices), "use_muon": True, "name": "muon", **ours},
        {"params": list(others), "use_muon": False, "name": "adam", "lr": params["adam_lr"], **theirs},
    ]
    try:
        optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError("deepspeed.optimizer.params", params, str(error) or "not accepted by Muon") from error
    return optimizer
