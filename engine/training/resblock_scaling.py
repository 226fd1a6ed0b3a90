"""Per-resblock gradient scaling for fp16 (Ramesh et al. 2021, arXiv 2102.12092, appendix D): a loss scale for each branch.

One scale for the whole network must be low enough for the largest gradient of any layer, and the smallest ones underflow: in a deep
transformer their exponents lie further apart than fp16 has room. So the identity path stays in float32, and each branch, attention
or feed-forward, has a scale of its own: its incoming gradient is multiplied by it, its outgoing one divided, with inf and nan set
to zero, and so are the gradients of its weights divided.

After a step a scale grows by 2^(1/1000) if its branch was clean. Else the branch's gradients count as zero in that step, and the
scale is divided by sqrt(2), at most once in 125 steps. Scales start at 2^13 and stay within 2^7 and 2^24. DALL-E's are of gradients
divided by the number of replicas, of which DeepSpeed takes the mean later, hence its factor M; a static `fp16.loss_scale`, which
DeepSpeed divides by in float32, is divided out here. DeepSpeed takes the gradients of weights in fp16, so what is gained is the
precision within the branches, before their sums over the batch.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.training.engines import is_fp16
from engine.training.process_group import World

_START, _LEAST, _MOST = 2.0**13, 2.0**7, 2.0**24
_GROWTH, _DIVISOR, _QUIET_STEPS = 2.0 ** (1 / 1000), math.sqrt(2), 125


class ResblockScaling:
    """Scales of all branches of a transformer, which it installs there; call `after_step` after every optimiser step.

    Args:
        loss_scale: static, by which the gradients that come in are multiplied already.
    """

    def __init__(self, model: KoDalle, world: World, *, loss_scale: float = 1.0) -> None:
        self._world, self._loss_scale = world, loss_scale
        layers = cast(list[Layer], list(model.layers))
        branches = [branch for layer in layers for branch in (layer.attention, layer.feed_forward)]
        device = world.device
        self.scales = torch.full((len(branches),), _START, dtype=torch.float64, device=device)
        self.divided_at = torch.full((len(branches),), -_QUIET_STEPS, dtype=torch.int64, device=device)
        self.found_bad = torch.zeros(len(branches), dtype=torch.float32, device=device)  # in this step, by branch
        for number, branch in enumerate(branches):
            self._install(branch, number)
        model.head.register_forward_pre_hook(_as_weights)

    def after_step(self, step: int) -> None:
        """Moves the scales, equally on all ranks; `step` is 1-based."""
        bad = self._world.sum_(self.found_bad) > 0
        may_divide = step - self.divided_at >= _QUIET_STEPS
        divides = bad & may_divide
        self.scales = torch.where(divides, self.scales / _DIVISOR, torch.where(bad, self.scales, self.scales * _GROWTH))
        self.scales.clamp_(_LEAST, _MOST)
        self.divided_at = torch.where(divides, torch.full_like(self.divided_at, step), self.divided_at)
        self.found_bad = torch.zeros_like(self.found_bad)

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"resblock_scales": self.scales.cpu(), "resblock_divided_at": self.divided_at.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.scales = state["resblock_scales"].to(self.scales.device)
        self.divided_at = state["resblock_divided_at"].to(self.divided_at.device)

    def _install(self, branch: nn.Module, number: int) -> None:
        plain = branch.forward

        def forward(x: Tensor, onto: Tensor) -> Tensor:
            dtype = next(branch.parameters()).dtype
            onto = onto.float()
            if not torch.is_grad_enabled():
                return onto + plain(x.to(dtype), torch.zeros_like(x, dtype=dtype)).float()
            scale = (self.scales[number] / self._loss_scale).float()
            inner = _Outgoing.apply(x.float(), scale, self.found_bad[number], dtype)
            return onto + _Incoming.apply(plain(inner, torch.zeros_like(x, dtype=dtype)), scale)

        def unscaled(gradient: Tensor) -> Tensor:
            scale = (self.scales[number] / self._loss_scale).float()
            is_clean = gradient.isfinite().all()
            self.found_bad[number] += (~is_clean).float()
            return torch.where(is_clean, gradient.float() / scale, 0.0).to(gradient.dtype)

        branch.forward = forward  # of this module alone
        for parameter in branch.parameters():
            if parameter.requires_grad:
                parameter.register_hook(unscaled)


class _Incoming(torch.autograd.Function):
    """A branch's result on its way to the float32 stream; its gradient, multiplied by the scale, comes back in fp16."""

    @staticmethod
    def forward(context: Any, result: Tensor, scale: Tensor) -> Tensor:
        context.save_for_backward(scale)
        context.dtype = result.dtype
        return result.float()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = context.saved_tensors
        return (gradient * scale).to(context.dtype), None


class _Outgoing(torch.autograd.Function):
    """The float32 stream on its way into a branch; the gradient that comes out is divided by the scale, in float32."""

    @staticmethod
    def forward(context: Any, x: Tensor, scale: Tensor, found_bad: Tensor, dtype: torch.dtype) -> Tensor:
        context.save_for_backward(scale)
        context.found_bad = found_bad
        return x.to(dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = context.saved_tensors
        finite = gradient.isfinite()
        context.found_bad += (~finite.all()).float()
        return torch.where(finite, gradient.float() / scale, 0.0), None, None, None


def _as_weights(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input in its weights' type: the stream is float32."""
    dtype = next(head.parameters()).dtype
    return tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs)


def make_resblock_scaling(model: KoDalle, settings: dict[str, Any], world: World) -> ResblockScaling:
    """Installs the scaling in a model that trains in fp16.

    Raises:
        InputError: another dtype, or a loss scale that moves: one scale a branch takes its place.
    """
    if not is_fp16(settings):
        raise InputError(
            "resblock_gradient_scaling", True, "is for deepspeed.fp16: bf16 and float32 need no loss scale"
        )
    loss_scale = float(settings["fp16"].get("loss_scale", 0))
    if loss_scale <= 0:
        raise InputError(
            "deepspeed.fp16.loss_scale", loss_scale, "resblock_gradient_scaling takes a moving one's place: write 1024"
        )
    return ResblockScaling(model, world, loss_scale=loss_scale)
