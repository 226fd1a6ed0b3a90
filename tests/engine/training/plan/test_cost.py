"""What a stage costs: parameters are counted, memory adds up, every part of a step is timed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config_files import parse_run
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.models.vqgan_loss import build_discriminator
from engine.training.plan import cost
from engine.training.plan.cost import StageCost, evaluation_seconds, measure_costs, undisturbed_s


@pytest.mark.slow
def test_costs_of_tiny_stages(
    run_tree: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a discriminator from step 3 of 8, whose steps differ from those before."""
    monkeypatch.setattr(cost, "_TIMED_STEPS", 2)
    trees = {stage: run_tree(stage, tmp_path / stage) for stage in ("vqgan", "koclip", "kodalle")}
    trees["kodalle"]["vqgan"] = "vqgan"
    runs = {stage: parse_run(tree, source=stage) for stage, tree in trees.items()}
    costs = measure_costs(runs, 24, torch.device("cpu"))

    vqgan, koclip, kodalle = (runs[stage] for stage in ("vqgan", "koclip", "kodalle"))
    modules: dict[str, list[torch.nn.Module]] = {
        "vqgan": [Vqgan(vqgan.model), build_discriminator(vqgan.loss)],  # type: ignore[arg-type, union-attr]
        "koclip": [KoClip(koclip.model)],  # type: ignore[arg-type]
        "kodalle": [KoDalle(kodalle.model)],  # type: ignore[arg-type]
    }
    for stage, found in costs.items():
        count = sum(p.numel() for module in modules[stage] for p in module.parameters() if p.requires_grad)
        assert found.parameters == count, stage
        assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (4 * count, 4 * count, 8 * count)
        assert found.memory_bytes == 16 * count + found.activation_bytes
        assert found.activation_bytes > 0
        assert found.step_s > 0
    for stage in ("koclip", "kodalle"):
        assert costs[stage].fixed_s > costs["vqgan"].fixed_s  # images are encoded first
    assert evaluation_seconds(costs, runs, captions=2, candidates=2) > evaluation_seconds(
        costs, runs, captions=1, candidates=2
    )


def test_twice_the_batch_keeps_twice_the_activations() -> None:
    """Only what the backward pass needs is counted, and weights are not."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    trained = cost._Trained([layers], torch.device("cpu"))
    kept = [trained.measure(lambda rows=rows: layers(torch.ones(rows, 64)).sum()).activation_bytes for rows in (8, 16)]  # type: ignore[misc]
    assert kept == [4 * 64 * 8 * 2, 4 * 64 * 16 * 2]  # the input and the ReLU's output


@pytest.mark.parametrize(
    ("wall_s", "processor_s", "threads", "expected"),
    [
        (0.09, 0.14, 2, 0.09),  # undisturbed: as it was timed
        (8.57, 0.48, 2, 0.48 / 2**0.6),  # beside programs that have the processors, whatever the clock says
        (86.0, 0.48, 2, 0.48 / 2**0.6),
        (1.7, 0.48, 1, 0.48),  # one thread: what it computed
        (0.09, 0.14, 64, 0.14 / 64**0.6),
    ],
)
def test_an_undisturbed_step(wall_s: float, processor_s: float, threads: int, expected: float) -> None:
    assert undisturbed_s(wall_s, processor_s, threads) == pytest.approx(expected)


@pytest.mark.parametrize(("used", "wanted_s", "slowdown"), [(1.9, 8.0, 1.0), (0.4, 0.5 / 2**0.6, 8 * 2**0.6 / 0.5)])
def test_a_step_beside_other_programs_is_timed_by_its_processor_time(
    used: float, wanted_s: float, slowdown: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of its own: a step takes 8 s on two threads, of which they compute `used` s each second; 0.5 s of processor time on one."""
    clock = {"wall": 0.0, "processor": 0.0}
    threads = torch.get_num_threads()

    def step() -> torch.Tensor:
        clock["wall"] += 8.0
        clock["processor"] += 0.5 if torch.get_num_threads() == 1 else 8.0 * used
        return layers(torch.ones(2, 64)).sum()

    monkeypatch.setattr(time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(time, "process_time", lambda: clock["processor"])
    torch.set_num_threads(2)
    try:
        layers = torch.nn.Linear(64, 64)
        found = cost._Trained([layers], torch.device("cpu")).measure(step)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (found.seconds, found.slowdown) == pytest.approx((wanted_s, slowdown))


def test_seconds_of_a_stage() -> None:
    assert StageCost(1, 1, 1, 1, 1, step_s=0.5, fixed_s=10).seconds(20) == 20
