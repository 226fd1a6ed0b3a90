"""PowerSGD: gradients of ranks averaged as two thin factors, for links that are slow beside the computation.

Vogels, Karimireddy and Jaggi, arXiv 1905.13727, algorithms 1 and 2, with error feedback and a warm start; torch has the same as a
hook of DistributedDataParallel, which DeepSpeed's engine is not. Here it takes the place of the engine's all-reduce at ZeRO
stage 0. What a rank leaves out of a step is added to its next gradient, so that nothing is lost for good; these errors and the
factors belong to the checkpoint.

A gradient is a matrix (n, m): a weight's first dimension by all the others. r is the rank; r (n + m) numbers are sent in the
place of n m.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.run import PowerSgdConfig, Run
from engine.errors import InputError
from engine.training.engines import DeepSpeedEngine, Engines, is_fp16, zero_stage
from engine.training.process_group import World

_LEAST_RATE = 2.0  # numbers saved over numbers sent, below which a gradient is sent whole


class PowerSgd:
    """Averages the gradients of `parameters` over ranks, in place; `engine.training.checkpoints.Restorable`.

    Args:
        seed: of the first factors; the same on all ranks.
        least_rate: gradients that would be compressed less are sent whole.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: PowerSgdConfig,
        world: World,
        *,
        seed: int,
        checkpoint_engine: Any = None,
        least_rate: float = _LEAST_RATE,
    ) -> None:
        self._config, self._world = config, world
        self.checkpoint_engine = checkpoint_engine
        self.steps = 0
        self._matrices = [p for p in parameters if self._rate(p) >= least_rate]
        compressed = {id(p) for p in self._matrices}
        self._whole = [p for p in parameters if id(p) not in compressed]
        self._errors = [torch.zeros(_shape(p), dtype=torch.float32, device=p.device) for p in self._matrices]
        generator = torch.Generator().manual_seed(seed)
        self._factors = [
            torch.randn(
                _shape(p)[1], min(config.rank, *_shape(p)), generator=generator, dtype=torch.float32, device="cpu"
            ).to(p.device)
            for p in self._matrices
        ]

    def sent_numbers(self) -> tuple[int, int]:
        """(numbers that a compressed step sends, numbers of all gradients)."""
        whole = sum(p.numel() for p in self._whole)
        thin = sum(
            factor.shape[1] * sum(error.shape) for factor, error in zip(self._factors, self._errors, strict=True)
        )
        return whole + thin, whole + sum(error.numel() for error in self._errors)

    @torch.no_grad()
    def average(self) -> None:
        """Replaces each gradient by the (approximate) mean over ranks. Parameters without a gradient must be so on all ranks."""
        self.steps += 1
        if self.steps <= self._config.start_step:
            self._mean_([p.grad for p in (*self._whole, *self._matrices) if p.grad is not None])
            return
        self._mean_([p.grad for p in self._whole if p.grad is not None])
        used = [index for index, p in enumerate(self._matrices) if p.grad is not None]
        for index in used:
            gradient = self._matrices[index].grad
            assert gradient is not None, index
            self._errors[index] += gradient.reshape(_shape(self._matrices[index])).float()
        left = [self._errors[index] @ self._factors[index] for index in used]  # (n, r)
        self._mean_(left)
        left = [torch.linalg.qr(factor).Q for factor in left]
        right = [self._errors[index].T @ factor for index, factor in zip(used, left, strict=True)]  # (m, r)
        self._mean_(right)
        for index, n_side, m_side in zip(used, left, right, strict=True):
            mean = n_side @ m_side.T
            self._errors[index] -= mean
            self._factors[index] = m_side
            gradient = self._matrices[index].grad
            assert gradient is not None, index
            gradient.copy_(mean.view(gradient.shape))

    def _mean_(self, tensors: Sequence[Tensor]) -> None:
        """Exact means over ranks, in place, in one message."""
        if not tensors:
            return
        flat = torch.cat([tensor.float().flatten() for tensor in tensors])
        self._world.sum_(flat)
        flat /= self._world.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _rate(self, parameter: nn.Parameter) -> float:
        if parameter.dim() < 2:
            return 0.0
        n, m = _shape(parameter)
        return n * m / (min(self._config.rank, n, m) * (n + m))

    def save_checkpoint(self, save_dir: str, /, *, tag: str, save_latest: bool) -> object:
        """Writes this rank's errors and factors."""
        place = self._file(save_dir, tag)
        place.parent.mkdir(parents=True, exist_ok=True)
        state = {"steps": self.steps, "errors": self._errors, "factors": self._factors}
        self.checkpoint_engine.save(state, str(place))
        return True

    def load_checkpoint(self, load_dir: str, /, *, tag: str) -> tuple[str | None, Any]:
        """Reads this rank's part, which the checkpoint's digests have vouched for."""
        place = self._file(load_dir, tag)
        state = torch.load(place, map_location="cpu", weights_only=True)
        for mine, stored in ((self._errors, state["errors"]), (self._factors, state["factors"])):
            if [tensor.shape for tensor in mine] != [tensor.shape for tensor in stored]:
                raise ValueError("the compression is of weights of other shapes")
            mine[:] = [tensor.to(own.device) for own, tensor in zip(mine, stored, strict=True)]
        self.steps = int(state["steps"])
        return str(place), None

    def _file(self, folder: str, tag: str) -> Path:
        return Path(folder) / tag / f"power-sgd-rank-{self._world.rank:05d}.pt"


def compress_gradients(run: Run, engines: Engines, world: World) -> dict[str, PowerSgd]:
    """Puts PowerSGD in the place of the engines' all-reduce, as `gradient_compression` states; {} without it.

    Raises:
        InputError: a ZeRO stage or dtype at which DeepSpeed reduces gradients elsewhere.
    """
    config = run.gradient_compression
    if config is None:
        return {}
    if zero_stage(run.deepspeed) != 0:
        stage = zero_stage(run.deepspeed)
        raise InputError("gradient_compression", f"ZeRO stage {stage}", "averages whole gradients: write stage 0")
    if is_fp16(run.deepspeed):
        raise InputError("gradient_compression", "fp16", "is tried in float32 and bf16 only: use one of these")
    if world.size == 1:
        return {}
    return {f"compression-{name}": _compress(engine, config, world, run.seed) for name, engine in engines.items()}


def _compress(engine: DeepSpeedEngine, config: PowerSgdConfig, world: World, seed: int) -> PowerSgd:
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    made = PowerSgd(parameters, config, world, seed=seed, checkpoint_engine=engine.checkpoint_engine)

    def instead(grads: object = None, elements_per_buffer: int = 0) -> None:
        made.average()

    engine.buffered_allreduce_fallback = instead  # type: ignore[attr-defined] # at ZeRO 0, once a step
    if world.is_main:
        sent, all_numbers = made.sent_numbers()
        print(
            f"gradients are compressed {all_numbers / sent:.0f} times from step {config.start_step + 1} on", flush=True
        )
    return made


def _shape(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter[0].numel()
