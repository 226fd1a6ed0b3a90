"""The update guard: no inf or nan reaches the weights, by whichever optimiser, and a GPU is not waited for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import InputError
from engine.training import update_guard
from engine.training.engines import DeepSpeedEngine, make_engine
from engine.training.process_group import World, free_port, join_world
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights
from tests.forked import DEEPSPEED, run_forked

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
BAD_STEP = 4  # the step whose loss or gradients are not finite
Loss = Callable[[nn.Module, int], Tensor]


class _TorchEngine:
    """torch's fused AdamW behind the interface of a DeepSpeed engine, float32 without ZeRO."""

    def __init__(self, *, accumulation: int = 1) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(4, 3)
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)
        self.skipped_steps = 0
        self._accumulation, self._micro_steps = accumulation, 0

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self._micro_steps + 1) % self._accumulation == 0

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._micro_steps += 1

    def get_global_grad_norm(self) -> None:
        return None


def _loss(module: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float32)
    output: Tensor = module(inputs.to(next(module.parameters()).dtype))
    return output.square().mean()


def _nan_loss(module: nn.Module, step: int) -> Tensor:
    """Gradients stay finite."""
    return _loss(module, step) + (torch.nan if step == BAD_STEP else 0.0)


def _nan_gradients(module: nn.Module, step: int) -> Tensor:
    """The loss stays finite."""
    loss = _loss(module, step)
    return loss + (loss * 0).sqrt() if step == BAD_STEP else loss


def _engine(engine: Any) -> DeepSpeedEngine:
    made: DeepSpeedEngine = engine
    return made


def _train(guard: UpdateGuard, engine: Any, loss: Loss, steps: range, *, accumulation: int = 1) -> None:
    for step in steps:
        guard.start_step(step)
        for _ in range(accumulation):
            guard.backward_and_step(engine, loss(engine.module, step))


@pytest.fixture
def skips_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: fused optimisers read the verdict themselves. torch's run the same way on CPU."""
    monkeypatch.setattr(update_guard, "_skips_on_device", lambda optimizer, _: optimizer._step_supports_amp_scaling)


@pytest.mark.parametrize(("loss", "reason"), [(_nan_loss, "loss nan"), (_nan_gradients, "grad_norm (nan|inf)")])
def test_host_stops_before_the_update(loss: Loss, reason: str) -> None:
    guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine()
    guard.watch(_engine(engine))
    _train(guard, engine, loss, range(1, BAD_STEP))
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    with pytest.raises(
        InputError, match=f"^training: step 4: {reason}: lower the learning rate, .*checkpoint is kept$"
    ):
        _train(guard, engine, loss, range(BAD_STEP, BAD_STEP + 1))
    assert all(torch.equal(*pair) for pair in zip(before, engine.module.parameters(), strict=True))


@pytest.mark.usefixtures("skips_on_device")
@pytest.mark.parametrize(("loss", "reason"), [(_nan_loss, "loss nan"), (_nan_gradients, "grad_norm (nan|inf)")])
def test_device_withholds_the_update_and_all_later_ones(loss: Loss, reason: str) -> None:
    guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine()
    guard.watch(_engine(engine))
    _train(guard, engine, loss, range(1, BAD_STEP))
    guard.check()
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    _train(guard, engine, loss, range(BAD_STEP, BAD_STEP + 3))
    assert all(torch.equal(*pair) for pair in zip(before, engine.module.parameters(), strict=True))
    with pytest.raises(InputError, match=f"^training: step 4: {reason}"):
        guard.check()


@pytest.mark.usefixtures("skips_on_device")
def test_device_and_host_train_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for _ in range(2):
        guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine()
        guard.watch(_engine(engine))
        _train(guard, engine, _loss, range(1, 6))
        weights.append([weight.detach().clone() for weight in engine.module.parameters()])
        monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


class _HostReads(TorchDispatchMode):
    """Counts reads of a tensor by the host, for each of which it waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("skips_on_device")
def test_host_reads_nothing_until_it_checks() -> None:
    guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine()
    guard.watch(_engine(engine))
    with _HostReads() as reads:
        _train(guard, engine, _loss, range(1, 4))
        assert reads.count == 0
        guard.check()
        assert reads.count == 1


def test_every_micro_batch_is_checked() -> None:
    guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine(accumulation=2)
    guard.watch(_engine(engine))
    losses = iter([0.0, 0.0, torch.nan, 0.0])
    with pytest.raises(InputError, match="step 2: loss nan"):
        _train(guard, engine, lambda module, step: _loss(module, step) + next(losses), range(1, 3), accumulation=2)


def test_fp16_gradients_are_deepspeeds_matter_and_the_loss_is_not() -> None:
    guard, engine = UpdateGuard(ALONE, fp16=True), _TorchEngine()
    guard.watch(_engine(engine))
    _train(guard, engine, _nan_gradients, range(BAD_STEP, BAD_STEP + 1))  # DeepSpeed would skip it
    engine = _TorchEngine()
    guard.watch(_engine(engine))
    with pytest.raises(InputError, match="step 4: loss nan"):
        _train(guard, engine, _nan_loss, range(BAD_STEP, BAD_STEP + 1))


def test_bare_optimisers_norm_is_before_clipping() -> None:
    guard, engine = UpdateGuard(ALONE, fp16=False), _TorchEngine()
    guard.watch(_engine(engine))
    assert guard.gradient_norm(_engine(engine)) is None
    _loss(engine.module, 1).backward()
    expected = torch.cat([weight.grad.flatten() for weight in engine.module.parameters() if weight.grad is not None])
    engine.optimizer.zero_grad()
    _train(guard, engine, _loss, range(1, 2))
    assert float(guard.gradient_norm(_engine(engine)) or 0) == pytest.approx(float(expected.norm()), rel=1e-6)


@pytest.fixture(scope="module")
def world() -> World:
    return join_world(torch_threads=1)


def _settings(zero: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True, "fused": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bf16},
    }


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_engines_keep_their_weights(
    zero: int, bf16: bool, on_device: bool, world: World, request: pytest.FixtureRequest
) -> None:
    """Two parameter groups, which ZeRO updates one after the other; the nan is in the second."""
    if on_device:
        request.getfixturevalue("skips_on_device")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    groups = [{"params": list(part.parameters())} for part in module]
    engine = make_engine(module, _settings(zero, bf16), total_steps=9, parameters=groups)
    guard = UpdateGuard(world, fp16=False)
    guard.watch(engine)

    def steps(numbers: Iterator[int]) -> None:
        for step in numbers:
            guard.start_step(step)
            loss = _loss(engine, step)  # type: ignore[arg-type]
            if step == BAD_STEP:
                loss.register_hook(lambda gradient: gradient * torch.nan)
            guard.backward_and_step(engine, loss)
        guard.check()

    start = full_weights(engine)
    steps(iter(range(1, BAD_STEP)))
    before = full_weights(engine)
    assert all(not torch.equal(start[name], before[name]) for name in start)
    skipped = engine.skipped_steps
    with pytest.raises(InputError, match="step 4: grad_norm nan"):
        steps(iter(range(BAD_STEP, BAD_STEP + 2)))
    after = full_weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.skipped_steps == skipped or on_device


def _nan_on_rank_1(rank: int, port: int, on_device: bool, answer: Path) -> None:
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    world = join_world(torch_threads=1)
    if on_device:
        pytest.MonkeyPatch().setattr(update_guard, "_skips_on_device", lambda *_: True)
    torch.manual_seed(0)
    engine = make_engine(nn.Linear(4, 3), _settings(1, False), total_steps=9)
    guard = UpdateGuard(world, fp16=False)
    guard.watch(engine)
    before: dict[str, Tensor] = {}
    try:
        for step in range(1, BAD_STEP + 2):
            if step == BAD_STEP:
                before = full_weights(engine)
            guard.start_step(step)
            loss = (_nan_loss if rank == 1 else _loss)(engine, step)  # type: ignore[arg-type]
            guard.backward_and_step(engine, loss)
        guard.check()
        message = "trained on"
    except InputError as error:
        message = str(error)
    torch.save((message, before, full_weights(engine)), answer)


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
def test_a_nan_on_one_rank_stops_all(on_device: bool, tmp_path: Path) -> None:
    """Its gradients are finite, so that only the loss of rank 1 gives it away."""
    port = free_port()
    jobs = [(_nan_on_rank_1, (rank, port, on_device, tmp_path / f"{rank}.pt")) for rank in range(2)]
    printed = run_forked(jobs, tmp_path, preload=[*DEEPSPEED, "engine.training.update_guard"])
    assert [code for code, _ in printed] == [0, 0], printed
    for rank in range(2):
        message, before, after = torch.load(tmp_path / f"{rank}.pt")
        assert message.startswith("training: step 4: loss nan: ")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert before
