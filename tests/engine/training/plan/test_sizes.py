"""The table: what is chosen for which images and which machine."""

from dataclasses import replace

import pytest

from engine.training.plan.facts import DatasetFacts, MachineFacts
from engine.training.plan.sizes import GIB, STAGES, TRANSFORMERS, choose_sizes

DATA = DatasetFacts(
    train=2610, validation=137, captions=900, vocabulary=230, longest_tokens=27, side=400, mentions_sides=False
)
CPU = MachineFacts(device="cpu", name="a processor", cores=2, memory_bytes=24 * GIB)
GPU = MachineFacts(device="cuda", name="a GPU", cores=16, memory_bytes=80 * GIB, gpus=1, has_bf16=True)


def _with(train: int) -> DatasetFacts:
    return replace(DATA, train=train, validation=train // 20)


def test_the_clothing_set_gets_about_the_sizes_that_were_tried_on_it() -> None:
    """configs/clothing: 64 pixels, 8 x 8 of 1,024, 6 layers of 256, 256 entries, 7,000 / 700 / 3,200 steps of 8 / 48 / 32."""
    sizes = choose_sizes(DATA, CPU)
    assert (sizes.image_size, sizes.grid, sizes.codebook_size) == (64, 8, 1024)
    assert (sizes.transformer.layers, sizes.transformer.dim) == (6, 256)
    assert (sizes.text_vocab_size, sizes.text_seq_len) == (256, 32)
    batches = {stage: schedule.batch for stage, schedule in sizes.schedules.items()}
    assert batches == {"vqgan": 8, "koclip": 48, "kodalle": 32}
    for stage, tried in (("vqgan", 7000), ("koclip", 700), ("kodalle", 3200)):
        assert 0.9 < sizes.schedules[stage].steps / tried < 1.1, stage
    assert sizes.discriminator
    assert sizes.flip


def test_captions_that_state_facts_are_learnt_beside_wrong_ones() -> None:
    plain, facts = choose_sizes(DATA, CPU), choose_sizes(replace(DATA, states_facts=True), CPU)
    assert (plain.hard_negative_captions, facts.hard_negative_captions) == (0, 2)
    assert "no facts" in plain.reasons["hard negatives"][1]


@pytest.mark.parametrize(
    ("train", "machine", "image_size", "grid"),
    [(40, CPU, 64, 8), (10**6, CPU, 64, 8), (300, GPU, 128, 16), (5000, GPU, 256, 16)]
    + [(5000, replace(GPU, memory_bytes=12 * GIB), 128, 16)],
)
def test_image_size_follows_the_machine_and_the_number(
    train: int, machine: MachineFacts, image_size: int, grid: int
) -> None:
    sizes = choose_sizes(_with(train), machine)
    assert (sizes.image_size, sizes.grid) == (image_size, grid)


@pytest.mark.parametrize(("side", "chosen"), [(400, 256), (200, 128), (100, 96), (90, 64), (40, 32), (20, 32)])
def test_images_are_not_made_larger_than_they_are(side: int, chosen: int) -> None:
    sizes = choose_sizes(replace(DATA, side=side), GPU)
    assert sizes.image_size == chosen
    assert (f"no larger than {side}" in sizes.reasons["image size"][1]) == (chosen < 256)


def test_a_short_budget_on_a_cpu_makes_the_images_smaller() -> None:
    assert choose_sizes(DATA, CPU, minutes=90).image_size == 64
    assert choose_sizes(DATA, CPU, minutes=5).image_size == 32
    assert choose_sizes(DATA, GPU, minutes=5).image_size == 256


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_models_grow_with_the_number_of_pairs(machine: MachineFacts) -> None:
    chosen = [choose_sizes(_with(train), machine) for train in (10, 100, 1_000, 10_000, 100_000, 1_000_000)]
    for name in ("codebook_size", "image_size"):
        values = [getattr(sizes, name) for sizes in chosen]
        assert values == sorted(values)
    widths = [sizes.transformer.dim for sizes in chosen]
    assert widths == sorted(widths)
    assert widths[-1] == (256 if machine is CPU else 1024)
    assert [sizes.augmented_views > 0 for sizes in chosen] == [True] * 4 + [False] * 2
    for sizes in chosen:
        assert 64 <= sizes.codebook_size <= 16384
        assert set(sizes.schedules) == set(STAGES)


def test_the_million_pairs_get_the_published_transformer() -> None:
    assert choose_sizes(_with(1_000_000), GPU).transformer == TRANSFORMERS[-1]
    assert choose_sizes(_with(1_000_000), GPU).codebook_size == 16384


@pytest.mark.parametrize("train", [9, 34, 300])
def test_batches_hold_no_more_than_half_of_the_images(train: int) -> None:
    for stage, schedule in choose_sizes(_with(train), CPU).schedules.items():
        assert 2 <= schedule.batch <= max(2, train // 2), stage


def test_text_sizes_follow_the_captions() -> None:
    sizes = choose_sizes(replace(DATA, vocabulary=1000, longest_tokens=33, mentions_sides=True), CPU)
    assert (sizes.text_vocab_size, sizes.text_seq_len) == (1024, 40)
    assert not sizes.flip
    assert sizes.reasons["mirroring"] == ("no", "captions say left or right")
    long = choose_sizes(replace(DATA, longest_tokens=300), CPU)
    assert long.text_seq_len == 128
    assert "300 would not all fit" in long.reasons["text length"][1]


def test_every_line_has_a_value_and_a_reason() -> None:
    for name, (value, reason) in choose_sizes(DATA, CPU).reasons.items():
        assert value, name
        assert len(reason) > 5, name


def test_cut_outs_on_a_cpu_get_96_pixels_where_there_is_time() -> None:
    """As configs/clothing."""
    cut = replace(DATA, ground="#eeeeec")
    assert (choose_sizes(cut, CPU).image_size, choose_sizes(cut, CPU).grid) == (96, 12)
    assert choose_sizes(cut, CPU, minutes=180).image_size == 96
    assert choose_sizes(cut, CPU, minutes=60).image_size == 64
    assert choose_sizes(replace(cut, train=300), CPU).image_size == 64


@pytest.mark.parametrize(
    ("train", "machine", "small"),
    [(300, CPU, True), (10**6, CPU, True), (2000, GPU, True), (50_000, GPU, False), (300, replace(GPU, has_bf16=False), False)],
)  # fmt: skip
def test_small_transformers_get_the_options_that_were_tried_on_them(
    train: int, machine: MachineFacts, small: bool
) -> None:
    sizes = choose_sizes(_with(train), machine)
    assert sizes.small_transformer == small
    assert ("Muon" in sizes.reasons["transformer's options"][0]) == small
