"""What a stage costs here: parameters and memory from its modules, seconds from a few timed steps of them.

A timed step is forward, backward and AdamW on random images and tokens, without DeepSpeed and without reading files. What a
run does besides its steps (start, validation, encoding, generation) is estimated from the same measurements. All seconds are those of a
machine that nothing else uses (`undisturbed_s`).

B images a micro batch, S pixels.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.config.stages import KoclipRun, KodalleRun, VqganRun
from engine.measure import time_runs
from engine.models.koclip import KnownPairs, KoClip
from engine.models.perceptual import perceptual_from_config
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.models.vqgan_loss import build_discriminator, discriminator_loss, generator_loss
from engine.training.plan.configs import AnyRun

_TIMED_STEPS = 5
_TIMED_S = 4.0  # of one kind of step, at most
# Of the processor time of all threads, from which a step counts as undisturbed: threads that wait for others of their own spin.
_UNDISTURBED = 0.8
# n threads take a step n ** 0.6 times as fast as one: 0.48 s of processor time for one of configs/demo's VQGAN on one thread, 0.63 s on
# two that sleep where they wait.
_SPEED_UP = 0.6
_STEP_OVERHEAD = 1.15  # DeepSpeed, batches, validation, samples, checkpoints, over the bare steps


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage on one device.

    parameters: trained ones.
    weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes: of one process, ZeRO not counted.
    step_s: seconds of an optimiser step.
    fixed_s: seconds before the first step and after the last.
    slowdown: how many times as long a step took, where other programs had the processors.
    """

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    step_s: float
    fixed_s: float
    slowdown: float = 1.0

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def seconds(self, steps: int) -> float:
        return self.fixed_s + steps * self.step_s


def undisturbed_s(wall_s: float, processor_s: float, threads: int) -> float:
    """Seconds of a step that has the processors to itself, from what it takes beside other programs.

    Threads wait for each other at the end of every operation, spinning: where other programs have one of two processors, a step takes
    not twice but up to fifty times as long, and much more processor time. A single thread waits for none, and its processor time
    goes on only while it computes.

    Args:
        wall_s: on the clock, on `threads` threads.
        processor_s: of the step on one thread.
    """
    return min(wall_s, processor_s / threads**_SPEED_UP)


def measure_costs(runs: dict[str, AnyRun], num_train: int, device: torch.device) -> dict[str, StageCost]:
    """Costs of the three stages.

    Args:
        runs: vqgan, koclip and kodalle.
        num_train: images in the training split, which are encoded once before the ranker and the transformer train.
    """
    vqgan, koclip, kodalle = runs["vqgan"], runs["koclip"], runs["kodalle"]
    assert isinstance(vqgan, VqganRun), vqgan.stage
    assert isinstance(koclip, KoclipRun), koclip.stage
    assert isinstance(kodalle, KodalleRun), kodalle.stage
    start_s = _measure_start()
    costs = {"vqgan": _vqgan(vqgan, device, start_s)}
    view_s = view_seconds(costs["vqgan"], vqgan, num_train)
    views = (2 if kodalle.data.flip else 1) + kodalle.augmented_views
    costs["koclip"] = _koclip(koclip, device, start_s + 2 * view_s)  # encoded and decoded
    costs["kodalle"] = _kodalle(kodalle, device, start_s + views * view_s)
    return costs


def vqgan_cost_in_bf16(run: VqganRun, device: torch.device, float_cost: StageCost) -> StageCost:
    """The VQGAN's cost with products in bfloat16, everything else as in float32."""
    return _vqgan(run, device, float_cost.fixed_s, bf16=True)


def view_seconds(cost: StageCost, vqgan: AnyRun, num_train: int) -> float:
    """Seconds to encode one view of every training image: a forward pass is a third of a step, the encoder half of it."""
    return num_train * cost.step_s / _batch(vqgan) / 6


def evaluation_seconds(
    costs: dict[str, StageCost], runs: dict[str, AnyRun], *, captions: int, candidates: int
) -> float:
    """Seconds to generate and score `captions` x `candidates` images, guidance included; a rough estimate."""
    kodalle, vqgan = runs["kodalle"], runs["vqgan"]
    # Decoding token by token costs several times one pass over the whole sequence; guidance doubles it.
    token_s = 2 * 4 * costs["kodalle"].step_s / _batch(kodalle) / 3
    return 20.0 + captions * candidates * (token_s + costs["vqgan"].step_s / _batch(vqgan) / 4)


def _batch(run: AnyRun) -> int:
    size = run.deepspeed.get("train_micro_batch_size_per_gpu")
    assert isinstance(size, int), size
    return size


def _measure_start() -> float:
    """Seconds until a training takes its first step: launcher and process each import what is imported here."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the trainings have it; DeepSpeed would warn
    started = time.process_time()
    import engine.training.stage_koclip
    import engine.training.stage_kodalle
    import engine.training.stage_vqgan  # noqa: F401

    return max(12.0, 3 * (time.process_time() - started))


def _vqgan(run: VqganRun, device: torch.device, fixed_s: float, *, bf16: bool = False) -> StageCost:
    model, config = Vqgan(run.model), run.loss
    model.residual_init()
    model.to(device)
    perceptual = perceptual_from_config(config, device)
    images = torch.rand(_batch(run), 3, run.model.image_size, run.model.image_size, dtype=torch.float32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    discriminator = build_discriminator(config).to(device) if config.disc_weight > 0 else None

    def generator(step: int) -> tuple[Tensor, Tensor]:
        reconstruction, quantiser_loss, _ = model(images)
        loss, _ = generator_loss(
            discriminator, reconstruction, images, quantiser_loss, model.last_layer_weight,
            step=step, config=config, perceptual=perceptual,
        )  # fmt: skip
        return loss, reconstruction.detach()

    plain = _Trained([model], device, bf16=bf16)
    early = plain.measure(lambda: generator(config.disc_start - 1)[0])
    if discriminator is None:
        return plain.cost(early, fixed_s)
    d_optimizer = torch.optim.AdamW(discriminator.parameters())
    reconstructed: list[Tensor] = []

    def late() -> Tensor:
        discriminator.requires_grad_(False)
        loss, reconstruction = generator(config.disc_start)
        reconstructed[:] = [reconstruction]
        return loss

    def discriminate() -> None:
        discriminator.requires_grad_(True)
        loss, _ = discriminator_loss(discriminator, reconstructed[0], images)
        loss.backward()
        d_optimizer.step()
        d_optimizer.zero_grad()

    both = plain.measure(late, discriminate)
    steps = run.loop.steps or 1
    share = min(1.0, config.disc_start / steps)
    with_both = _Trained([model, discriminator], device, bf16=bf16)
    seconds = share * early.seconds + (1 - share) * both.seconds
    wall_s = share * early.seconds * early.slowdown + (1 - share) * both.seconds * both.slowdown
    return with_both.cost(StepTime(seconds, wall_s / seconds, both.activation_bytes), fixed_s)


def _koclip(run: KoclipRun, device: torch.device, fixed_s: float) -> StageCost:
    model, batch, config = KoClip(run.model).to(device), _batch(run), run.model
    images = torch.rand(batch, 3, config.image_size, config.image_size, dtype=torch.float32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    tokens = torch.randint(5, config.text_vocab_size, (batch, config.text_seq_len), device=device, dtype=torch.int64)
    negatives = images[: round(run.spliced_negatives * batch)] if run.spliced_negatives else None
    wrong = tokens[:, None].repeat(1, run.hard_negative_captions, 1) if run.hard_negative_captions else None
    has_wrong = None if wrong is None else torch.ones(batch, dtype=torch.bool, device=device)
    known = KnownPairs(negatives, None, wrong, has_wrong)
    trained = _Trained([model], device)
    return trained.cost(trained.measure(lambda: model(images, tokens, known=known)), fixed_s)


def _kodalle(run: KodalleRun, device: torch.device, fixed_s: float) -> StageCost:
    config, batch = run.model, _batch(run)
    model = KoDalle(config, embedding_std=run.embedding_std, attention_backend="sdpa").to(device)
    text = torch.randint(5, config.text_vocab_size, (batch, config.text_seq_len), device=device, dtype=torch.int64)
    image = torch.randint(config.image_vocab_size, (batch, config.image_seq_len), device=device, dtype=torch.int64)
    trained = _Trained([model], device)
    return trained.cost(trained.measure(lambda: model(text, image).loss), fixed_s)


class StepTime(NamedTuple):
    """Seconds of an undisturbed step, how many times as long it took, and bytes of its activations."""

    seconds: float
    slowdown: float
    activation_bytes: int


class _Trained:
    """Modules under one AdamW, timed; on a GPU, and with `bf16`, under bfloat16 autocast."""

    def __init__(self, modules: list[nn.Module], device: torch.device, *, bf16: bool = False) -> None:
        self._device, self._bf16 = device, bf16 or device.type == "cuda"
        self._parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0)

    def measure(self, loss: Callable[[], Tensor], after: Callable[[], None] = lambda: None) -> StepTime:
        """The seconds of a step, and the bytes of what the forward passes keep for the backward passes.

        Args:
            after: what else belongs to a step, once its gradients are there.
        """

        def step() -> None:
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
                value = loss()
            value.backward()
            after()
            self._optimizer.step()
            self._optimizer.zero_grad()

        with _saved_bytes(self._parameters) as saved:
            step()  # warms up, too
        threads = torch.get_num_threads()
        started, started_cpu = time.perf_counter(), time.process_time()
        wall_s = min(time_runs(step, self._device, repeat=_TIMED_STEPS, budget_s=_TIMED_S))
        used = (time.process_time() - started_cpu) / (time.perf_counter() - started) / threads
        seconds = wall_s
        if self._device.type == "cpu" and used < _UNDISTURBED:
            seconds = undisturbed_s(wall_s, _processor_seconds(step), threads)
        return StepTime(seconds, wall_s / seconds, saved[0])

    def cost(self, time: StepTime, fixed_s: float) -> StageCost:
        count = sum(parameter.numel() for parameter in self._parameters)
        mixed = 2 * count if self._device.type == "cuda" else 0  # 16-bit copies beside the float32 weights
        return StageCost(
            parameters=count,
            weight_bytes=4 * count + mixed,
            gradient_bytes=4 * count,
            optimizer_bytes=8 * count,
            activation_bytes=time.activation_bytes,
            step_s=time.seconds * _STEP_OVERHEAD,
            fixed_s=fixed_s,
            slowdown=time.slowdown,
        )


def _processor_seconds(step: Callable[[], None]) -> float:
    """Processor time of a step on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()  # oneDNN prepares operations for a number of threads
        started = time.process_time()
        step()
        return time.process_time() - started
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _saved_bytes(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Bytes that autograd keeps within the block, each storage counted once, parameters (and views of them) not at all."""
    total, seen = [0], {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
