"""Grids larger than the trained one: the tokens of a direct loop, of a plain generation where it is as large, alone as in a batch."""

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.sampler import Sampler
from engine.decoding.sliding_window import (
    TokenGrid,
    Window,
    generate_grid,
    num_positions,
    window_batches,
    window_origins,
    window_request,
)
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference
from tests.engine.decoding.cases import CONFIG, NULL, OPTIONS, TEXT, random_model

G = CONFIG.image_grid_size
REQUESTS = [
    SequenceRequest(0, SamplingParams(seed=7), candidate=0),
    SequenceRequest(0, SamplingParams(seed=7), candidate=1),
    SequenceRequest(1, SamplingParams(seed=2**64 - 1, guidance_scale=2.0, temperature=0.8, top_k=20), candidate=3),
]


def _sampler(model: KoDalle | None = None, *, speculative: bool = True) -> Sampler:
    return Sampler(model or random_model(), null_text_tokens=NULL, speculative=speculative)


def _first_window(cell: int, length: int) -> tuple[int, int]:
    """Number and origin of the first window along a side that has a cell."""
    number, origin = 0, 0
    while origin + G <= cell:
        number, origin = number + 1, min(origin + G // 2, length - G)
    return number, origin


@torch.no_grad()
def _direct(model: KoDalle, request: SequenceRequest, grid: TokenGrid) -> Tensor:
    """Cell by cell, in the raster order of the whole grid, each from a whole pass over its window."""
    model.eval()
    params, tokens = request.sampling_params, torch.zeros(grid, dtype=torch.int64)
    for row in range(grid.rows):
        for column in range(grid.columns):
            (i, top), (j, left) = _first_window(row, grid.rows), _first_window(column, grid.columns)
            place = (row - top) * G + column - left
            window = tokens[top : top + G, left : left + G].reshape(1, -1)[:, : place + 1]
            logits = model.logits(TEXT[request.prefix_index][None], window)[1][0, -1:]
            if params.is_guided:
                null = model.logits(NULL[None], window)[1][0, -1:]
                logits = null + params.guidance_scale * (logits - null)
            own = window_request(request, Window(i, j, top, left))
            seed = own.seed - 2**64 * (own.seed >= 2**63)
            columns = [torch.tensor([value]) for value in (seed, own.candidate, place)]
            filters = [torch.tensor([value]) for value in (params.temperature, params.top_k or 0, params.top_p or 1.0)]
            tokens[row, column] = reference.sample(logits, *columns, *filters)[0]
    return tokens.flatten()


@pytest.mark.parametrize("grid", [TokenGrid(4, 6), TokenGrid(7, 4), TokenGrid(6, 7)], ids=str)
def test_tokens_are_those_of_a_direct_loop(grid: TokenGrid) -> None:
    sampler = _sampler()
    tokens = generate_grid(sampler, sampler.prefill(TEXT), REQUESTS, grid)
    for own, request in zip(tokens, REQUESTS, strict=True):
        assert torch.equal(own, _direct(sampler.model, request, grid)), request


@pytest.mark.parametrize("name", ["target_positions", "token_shift", "rotary", "axial", "minDALL-E"])
def test_tokens_of_other_families_are_those_of_a_direct_loop(name: str) -> None:
    model, grid = random_model(_config(name)), TokenGrid(5, 6)
    sampler = _sampler(model)
    tokens = generate_grid(sampler, sampler.prefill(TEXT), REQUESTS, grid)
    for own, request in zip(tokens, REQUESTS, strict=True):
        assert torch.equal(own, _direct(model, request, grid)), request


def _config(name: str) -> TransformerConfig:
    return TransformerConfig(**(CONFIG.model_dump() | OPTIONS[name]))


def test_the_trained_size_is_the_plain_generation() -> None:
    sampler = _sampler()
    prefix = sampler.prefill(TEXT)
    assert torch.equal(
        generate_grid(sampler, prefix, REQUESTS, TokenGrid(G, G)), sampler.decode(prefix, list(REQUESTS))
    )


def test_the_upper_left_part_is_the_plain_generation_and_a_longer_image_goes_on() -> None:
    sampler = _sampler()
    prefix = sampler.prefill(TEXT)
    plain = sampler.decode(prefix, list(REQUESTS)).view(-1, G, G)
    wide, wider = (generate_grid(sampler, prefix, REQUESTS, TokenGrid(G, width)).view(-1, G, width) for width in (6, 8))
    assert torch.equal(wide[:, :, :G], plain)
    assert torch.equal(wider[:, :, :6], wide)


@pytest.mark.parametrize("speculative", [True, False], ids=["windows", "single steps"])
def test_alone_as_in_a_batch(speculative: bool) -> None:
    sampler, grid = _sampler(speculative=speculative), TokenGrid(6, 6)
    prefix = sampler.prefill(TEXT)
    together = generate_grid(sampler, prefix, REQUESTS, grid)
    for number, request in enumerate(REQUESTS):
        assert torch.equal(generate_grid(sampler, prefix, [request], grid)[0], together[number])


def test_windows_of_one_image_have_noise_of_their_own() -> None:
    """Equal noise in two windows would sample equal tokens from a model that knows nothing."""
    model = random_model()
    with torch.no_grad():
        model.head.weight.zero_()
    sampler = _sampler(model)
    tokens = generate_grid(sampler, sampler.prefill(TEXT), REQUESTS[:1], TokenGrid(G, 6 * G)).view(G, 6 * G)
    halves = tokens[:, G:].unfold(1, G // 2, G // 2).transpose(0, 1).flatten(1)  # each window's new cells
    assert len(halves) == 10
    assert len({tuple(half.tolist()) for half in halves}) == 10
    agreeing = (halves[1:] == halves[:-1]).float().mean()
    assert agreeing < 0.1  # 1 of 64 by chance


def test_each_window_comes_after_those_that_it_needs() -> None:
    for grid, per_batch in ((TokenGrid(4, 4), 3), (TokenGrid(5, 11), 1), (TokenGrid(16, 9), 2)):
        have = torch.zeros(grid, dtype=torch.bool)
        for windows in window_batches(grid, G, per_batch=per_batch):
            assert len(windows) <= per_batch
            before = have.clone()
            for window in windows:
                part = before[window.top : window.top + G, window.left : window.left + G]
                above, left = int(part[:, -1].sum()), int(part[-1].sum())  # known in the last column, in the last row
                assert (above >= G // 2) == (window.row > 0)
                assert (left >= G // 2) == (window.column > 0)
                expected = torch.zeros(G, G, dtype=torch.bool)
                expected[:above], expected[:, :left] = True, True
                assert torch.equal(part, expected), window
                assert not part.all()
                have[window.top : window.top + G, window.left : window.left + G] = True
        assert have.all()


def test_origins() -> None:
    assert [window_origins(length, 4) for length in (4, 5, 6, 8, 9)] == [[0], [0, 1], [0, 2], [0, 2, 4], [0, 2, 4, 5]]
    assert window_origins(3, 1) == [0, 1, 2]
    with pytest.raises(ValueError, match="3 cells are fewer"):
        window_origins(3, 4)


def test_progress_counts_every_position() -> None:
    sampler, grid = _sampler(), TokenGrid(6, 6)
    seen: list[int] = []
    generate_grid(sampler, sampler.prefill(TEXT), REQUESTS, grid, on_progress=seen.append)
    assert seen == list(range(1, num_positions(grid, G, len(REQUESTS)) + 1))
    assert len(seen) == 3 * G * G  # three diagonals


def test_requests_of_a_window() -> None:
    request = SequenceRequest(1, SamplingParams(seed=3, temperature=0.5, candidates=4), candidate=2)
    assert window_request(request, Window(0, 0, 0, 0)) is request
    other = window_request(request, Window(0, 1, 0, 2))
    assert dataclasses.replace(other, sampling_params=request.sampling_params) == request
    assert other.sampling_params == request.sampling_params.updated(seed=other.seed)
    assert len({window_request(request, Window(i, j, 0, 0)).seed for i in range(5) for j in range(5)}) == 25
