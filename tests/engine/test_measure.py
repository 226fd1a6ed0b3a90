"""FLOP counts are right and change no result; roofline formulas equal the figures worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import measure
from engine.config.transformer import TransformerConfig
from engine.measure import (
    Machine,
    Workload,
    count_flops,
    decode_floor_s,
    kv_position_bytes,
    layer_weights,
    matrix_peak,
    mean_step_bytes,
    prefill_floor_s,
    prefill_flops,
    read_bandwidth,
    step_bytes,
    step_flops,
    step_weights,
    sum_over_lengths,
    time_runs,
    uncached_flops,
)
from engine.models.transformer import KoDalle

CPU = torch.device("cpu")


def test_linear_layer_forward_and_backward() -> None:
    layer = nn.Linear(8, 4)
    images = torch.randn(3, 8, requires_grad=True)
    _, forward = count_flops(lambda: layer(images))
    assert forward == 2 * 3 * 8 * 4
    _, both = count_flops(lambda: layer(images).sum().backward())
    assert both == 3 * forward


def test_convolution() -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    _, flops = count_flops(lambda: convolution(torch.randn(2, 3, 8, 8)))
    assert flops == 2 * 2 * 8 * 8 * 5 * 3 * 9


def test_inference_mode_hides_nothing() -> None:
    """There torch passes whole layers to the counter, which once counted nothing in them."""
    torch.manual_seed(0)
    linear, convolution = nn.Linear(8, 4), nn.Conv2d(3, 5, 3)
    rows, images, q = torch.randn(2, 3, 8), torch.randn(1, 3, 8, 8), torch.randn(1, 2, 6, 8)

    def work() -> list[torch.Tensor]:
        attended = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return [linear(rows), convolution(images), rows @ rows.mT, torch.einsum("btc,bsc->bts", rows, rows), attended]

    with torch.no_grad():
        expected, outside = count_flops(work)
    with torch.inference_mode():
        results, inside = count_flops(work)
        assert all(torch.equal(*pair) for pair in zip(results, work(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    products = 2 * 6 * 8 * 4 + 2 * 36 * 5 * 27 + 2 * (2 * 2 * 9 * 8)
    attention = 2 * (2 * 2 * 36 * 8)
    assert inside == outside == products + attention


def test_attention_forward_and_backward() -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    attend = lambda: nn.functional.scaled_dot_product_attention(q, q, q)
    _, forward = count_flops(attend)
    _, both = count_flops(lambda: attend().sum().backward())
    assert forward == 2 * (2 * 2 * 36 * 8)
    assert both == 3.5 * forward  # scores again, and the gradients of q, k, v and of the scores


def test_counting_changes_no_bit() -> None:
    """torch's own FlopCounterMode decomposes BatchNorm: counted steps had other gradients than uncounted ones."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    images = torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    plain = gradients()
    counted, flops = count_flops(gradients)
    assert flops > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_peak_is_a_speed(dtype: torch.dtype) -> None:
    assert 1e7 < matrix_peak(CPU, dtype, size=64, seconds=0.01) < 1e15


def test_runs_are_timed_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each run moves on by a quarter of a second, and nothing else."""
    runs: list[int] = []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: len(runs) / 4))
    work = lambda: runs.append(0)
    assert time_runs(work, CPU, repeat=3) == [0.25] * 3
    assert len(runs) == 3
    assert time_runs(work, CPU, repeat=1000, budget_s=0.75) == [0.25] * 3
    assert time_runs(work, CPU, repeat=1000, budget_s=0) == [0.25]


def test_bandwidth_is_a_speed() -> None:
    assert 1e7 < read_bandwidth(CPU, num_bytes=1 << 22, seconds=0.01) < 1e14


# ------------------------------------------------------------------------------------------------------------ roofline

PUBLISHED = TransformerConfig()
H200 = Machine(read_bytes_per_s=4.3e12, flop_per_s=790e12)
A100 = Machine(read_bytes_per_s=1.555e12, flop_per_s=312e12)
V100 = Machine(read_bytes_per_s=0.9e12, flop_per_s=125e12)


def _half(num_sequences: int, num_captions: int) -> Workload:
    return Workload(num_sequences=num_sequences, num_captions=num_captions, weight_bytes=2, kv_bytes=2)


def test_weights_are_the_models_own() -> None:
    """The formulas against the tensors of a model, by name."""
    sizes = TransformerConfig(dim=24, num_layers=3, num_heads=2, head_dim=8, ff_mult=2, image_vocab_size=20)
    model = KoDalle(sizes)
    assert layer_weights(sizes) == sum(parameter.numel() for parameter in model.layers[0].parameters())
    head = sum(rows.numel() for rows in model.head.image_rows())
    assert step_weights(sizes) == sum(parameter.numel() for parameter in model.layers.parameters()) + head


def test_published_sizes() -> None:
    assert layer_weights(PUBLISHED) == 14_696_448
    assert step_weights(PUBLISHED) == pytest.approx(251.94e6, rel=1e-4)
    assert 2 * step_weights(PUBLISHED) == pytest.approx(503.9e6, rel=1e-4)
    assert kv_position_bytes(PUBLISHED, _half(1, 1)) == 32 * 1024
    assert step_flops(PUBLISHED, _half(1, 1), 128) == pytest.approx(512e6, rel=1e-3)
    assert prefill_flops(PUBLISHED, 1) == pytest.approx(0.061e12, rel=0.01)
    assert uncached_flops(PUBLISHED) == pytest.approx(38.0e12, rel=0.01)


@pytest.mark.parametrize(
    ("machine", "sequences", "captions", "milliseconds"),
    [
        (H200, 1, 1, 30.4), (H200, 16, 16, 37.9), (H200, 16, 1, 34.1), (H200, 64, 64, 62.0), (H200, 64, 4, 46.9),
        (H200, 256, 256, 158.2), (H200, 256, 16, 98.3), (A100, 1, 1, 84.0), (A100, 16, 1, 94.4), (V100, 1, 1, 145),
        (V100, 16, 1, 163),
    ],
)  # fmt: skip
def test_decode_floor_of_known_machines(machine: Machine, sequences: int, captions: int, milliseconds: float) -> None:
    assert 1000 * decode_floor_s(PUBLISHED, _half(sequences, captions), machine) == pytest.approx(
        milliseconds, rel=5e-3
    )


@pytest.mark.parametrize(
    ("machine", "captions", "milliseconds"),
    [(H200, 1, 0.12), (H200, 16, 1.23), (H200, 256, 19.8), (A100, 1, 0.33), (A100, 16, 3.1), (V100, 16, 7.8)],
)
def test_prefill_floor_of_known_machines(machine: Machine, captions: int, milliseconds: float) -> None:
    floor_s = prefill_floor_s(PUBLISHED, _half(captions, captions), machine)
    assert 1000 * floor_s == pytest.approx(milliseconds, rel=0.03)


def test_int8_weights_halve_the_time_of_one_sequence() -> None:
    eight = Workload(num_sequences=1, num_captions=1, weight_bytes=1, kv_bytes=2)
    assert 1000 * decode_floor_s(PUBLISHED, eight, H200) == pytest.approx(15.4, rel=0.01)


def test_mean_step_is_the_mean_of_the_steps() -> None:
    load = _half(16, 1)
    steps = [step_bytes(PUBLISHED, load, own) for own in range(1, PUBLISHED.image_seq_len)]
    assert mean_step_bytes(PUBLISHED, load) == pytest.approx(sum(steps) / len(steps), rel=1e-12)


@pytest.mark.slow
def test_counted_work_is_what_the_formula_says() -> None:
    """Reading a caption at the published sizes, on tensors without memory; norms and biases are not counted."""
    with torch.device("meta"):
        model = KoDalle(PUBLISHED)
        captions = torch.zeros(1, PUBLISHED.text_seq_len, dtype=torch.int64)

    def read() -> torch.Tensor:
        x = model.text_embedding(captions)
        for layer in model.layers:
            x = layer(x, x)
        return torch.nn.functional.linear(model.head.norm(x[:, -1]), *model.head.image_rows())

    logits, counted = count_flops(read)
    assert logits.shape == (1, PUBLISHED.image_vocab_size)
    assert counted == pytest.approx(prefill_flops(PUBLISHED, 1), rel=0.02)


def test_sum_over_lengths() -> None:
    assert sum_over_lengths([3, 6], [1.0, 4.0]) == 1 + 2 + 3 + 4
    assert sum_over_lengths([1, 2, 3], [5.0, 1.0, 2.0]) == 8
    square = [length**2 * 1e-6 for length in range(129, 385)]
    few = [129 + round(255 * part / 8) for part in range(9)]
    whole = sum_over_lengths(few, [length**2 * 1e-6 for length in few])
    assert whole == pytest.approx(sum(square), rel=3e-3)
    for wrong in ([3, 3], [4, 3]):
        with pytest.raises(AssertionError):
            sum_over_lengths(wrong, [1.0, 1.0])
