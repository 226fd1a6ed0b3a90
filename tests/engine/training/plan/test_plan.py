"""From sizes to configs, with overrides, within a budget; what is printed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.stages import KoclipRun, KodalleRun, VqganRun
from engine.config_files import dump_tree, load_run
from engine.config_folders import different_sizes
from engine.errors import InputError
from engine.training.deepspeed_section import check_defaults
from engine.training.muon import check_muon
from engine.training.plan.configs import read_base
from engine.training.plan.cost import StageCost
from engine.training.plan.plan import (
    Plan,
    check_memory,
    describe,
    describe_costs,
    make_plan,
    plan_sizes,
    steps_for,
    views_for,
    with_bf16,
    with_views,
)
from engine.training.plan.sizes import STAGES, choose_sizes
from tests.engine.training.plan.test_sizes import CPU, DATA, GPU
from tests.paths import REPOSITORY

MIB = 2**20
COSTS = {
    "vqgan": StageCost(1_000_000, 4 * MIB, 4 * MIB, 8 * MIB, 100 * MIB, step_s=0.5, fixed_s=12),
    "koclip": StageCost(500_000, 2 * MIB, 2 * MIB, 4 * MIB, 50 * MIB, step_s=0.4, fixed_s=12),
    "kodalle": StageCost(3_000_000, 12 * MIB, 12 * MIB, 24 * MIB, 200 * MIB, step_s=1.0, fixed_s=30),
}
PLANNED = {"vqgan": 7000, "koclip": 700, "kodalle": 3200}


def _plan(*overrides: str, **options: Any) -> Plan:
    return plan_sizes(DATA, options.pop("machine", CPU), Path("run"), Path("pairs"), overrides=overrides, **options)[1]


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_configs_are_valid_and_fit_each_other(machine: Any, tmp_path: Path) -> None:
    plan = _plan(machine=machine)
    vqgan, koclip, kodalle = (plan.runs[stage] for stage in STAGES)
    assert isinstance(vqgan, VqganRun)
    assert isinstance(koclip, KoclipRun)
    assert isinstance(kodalle, KodalleRun)
    assert kodalle.model.image_vocab_size == vqgan.model.codebook_size
    assert kodalle.model.image_grid_size == vqgan.model.grid_size
    assert kodalle.model.text_vocab_size == koclip.model.text_vocab_size == koclip.text.vocab_size
    assert kodalle.model.text_seq_len == koclip.model.text_seq_len
    assert kodalle.text.tokenizer == str(kodalle.koclip) == "run/koclip/model"
    assert koclip.codec == kodalle.vqgan == Path("run/vqgan/model")
    for stage, run in plan.runs.items():
        check_defaults(run.deepspeed, processes=max(1, machine.gpus))
        check_muon(run.deepspeed)
        file = tmp_path / f"{stage}.yaml"
        file.write_text(dump_tree(plan.trees[stage]), encoding="utf-8")
        assert load_run(file) == run


def test_overrides_reach_their_stage_and_what_follows_from_it() -> None:
    plan = _plan(
        "vqgan.model.codebook_size=128", "vqgan.model.image_size=96", "koclip.model.text_seq_len=48",
        "koclip.model.text_position_rows=50", "kodalle.loop.steps=40", "kodalle.generation.temperature=0.9",
    )  # fmt: skip
    vqgan, koclip, kodalle = (plan.runs[stage] for stage in STAGES)
    assert isinstance(vqgan, VqganRun)
    assert isinstance(koclip, KoclipRun)
    assert isinstance(kodalle, KodalleRun)
    assert (kodalle.model.image_vocab_size, kodalle.model.image_grid_size) == (128, 12)
    assert koclip.model.image_size == 96
    assert (kodalle.model.text_seq_len, kodalle.model.text_position_rows) == (48, 49)
    assert kodalle.generation.temperature == 0.9
    assert kodalle.loop.steps == 40
    assert kodalle.loop.validate_every == 4  # follows the steps
    assert vqgan.loop.steps == _plan().runs["vqgan"].loop.steps


def test_a_short_run_still_gets_a_codebook() -> None:
    for steps in (1, 2, 4, 20):
        vqgan = _plan(f"vqgan.loop.steps={steps}").runs["vqgan"]
        assert isinstance(vqgan, VqganRun)
        assert vqgan.codebook_reset.start_step < steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.steps=4", "--set: loop.steps=4: write stage.key=value"),
        ("kodalle.loop.steps", "--set: kodalle.loop.steps: write stage.key=value"),
        ("kodalle.loop.steps=many", "--set: kodalle.loop.steps=many: give a whole number"),
        ("kodalle.model.dims=64", "model.dims: 64: unknown key"),
        ("vqgan.model.image_size=65", "image_size 65 must be divisible"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        _plan(override)
    assert message in str(caught.value)


def test_steps_fill_the_budget_and_no_more() -> None:
    for minutes in (10.0, 45.0, 90.0):
        steps = steps_for(minutes, COSTS, PLANNED, stated={}, other_s=60)
        seconds = 60 + sum(cost.seconds(steps[stage]) for stage, cost in COSTS.items())
        assert seconds <= minutes * 60
        assert seconds > 0.95 * minutes * 60


def test_a_long_budget_is_not_spent_on_what_was_enough() -> None:
    steps = steps_for(10_000, COSTS, PLANNED, stated={}, other_s=0)
    assert steps == {stage: 2 * number for stage, number in PLANNED.items()}


def test_what_one_stage_does_not_need_goes_to_the_others() -> None:
    few = steps_for(90, COSTS, PLANNED | {"koclip": 20}, stated={}, other_s=0)
    many = steps_for(90, COSTS, PLANNED, stated={}, other_s=0)
    assert few["koclip"] == 40
    assert few["vqgan"] > many["vqgan"]
    assert few["kodalle"] > many["kodalle"]


@pytest.mark.parametrize(("view_s", "views"), [(1.0, 6), (54.0, 6), (100.0, 5), (600.0, 0)])
def test_views_that_would_eat_the_budget_are_left_out(view_s: float, views: int) -> None:
    assert views_for(90, 6, view_s) == min(views, 6)
    sizes = with_views(choose_sizes(DATA, CPU), views, "for the test")
    kodalle = make_plan(sizes, DATA, Path("run"), Path("pairs")).runs["kodalle"]
    assert isinstance(kodalle, KodalleRun)
    assert kodalle.augmented_views == views  # and augment_shift goes with them, or the config would be refused


def test_stated_steps_stay_and_count() -> None:
    steps = steps_for(60, COSTS, PLANNED, stated={"kodalle": 1000}, other_s=0)
    assert set(steps) == {"vqgan", "koclip"}
    total = 1000 * 1.0 + sum(steps[stage] * COSTS[stage].step_s for stage in steps) + 54
    assert total <= 3600


def test_too_few_minutes_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(InputError, match=r"--minutes: 1: are too few on this machine: give \d+ or more") as caught:
        steps_for(1, COSTS, PLANNED, stated={}, other_s=60)
    needed = float(str(caught.value).split("give ")[1].split(" ")[0])
    assert steps_for(needed, COSTS, PLANNED, stated={}, other_s=60)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_budget_is_a_positive_number(minutes: float) -> None:
    with pytest.raises(InputError, match="--minutes"):
        _plan(minutes=minutes)


def test_what_is_printed() -> None:
    plan = _plan("kodalle.loop.steps=40")
    text = describe(plan, DATA, CPU)
    assert "2,747 captioned images; a processor, 2 cores, 24 GiB" in text
    for name, (value, reason) in plan.reasons.items():
        assert any(name in line and value in line and reason in line for line in text.splitlines()), name
    costs = describe_costs(plan, COSTS, other_s=60)
    kodalle = next(line for line in costs.splitlines() if "kodalle" in line)
    for cell in ("3,000,000", "12 MiB", "24 MiB", "200 MiB", "248 MiB", " 40 ", "1.000 s", "1.2"):
        assert cell in kodalle, cell
    assert costs.splitlines()[-1].endswith("in all")


def test_more_memory_than_there_is_is_refused_before_training() -> None:
    check_memory(COSTS, CPU)
    large = COSTS | {"kodalle": StageCost(1, 0, 0, 0, 23 * 2**30, step_s=1, fixed_s=0)}
    with pytest.raises(
        InputError, match=r"kodalle\.deepspeed.train_micro_batch_size_per_gpu: 23\.0 GiB: is more than 90 %"
    ):
        check_memory(large, CPU)


def test_training_on_from_a_model_takes_its_sizes() -> None:
    base = read_base(REPOSITORY / "models" / "clothing")
    new, old = _plan(), _plan(base=base)
    for stage, part in (("vqgan", "vqgan"), ("koclip", "koclip"), ("kodalle", "transformer")):
        run = old.runs[stage]
        assert run.start_from == base.folder
        assert different_sizes(run.model, base.config[part]) == []
        steps = new.runs[stage].loop.steps
        assert steps is not None
        assert run.loop.steps == steps // 2
        rates = [plan.runs[stage].deepspeed["optimizer"]["params"]["lr"] for plan in (old, new)]
        assert rates[0] == pytest.approx(rates[1] / 3)
    vqgan = old.runs["vqgan"]
    assert isinstance(vqgan, VqganRun)
    assert vqgan.codebook_reset.reset_every == 0  # the transformer knows its codes


def test_new_words_make_the_text_tables_of_both_grow() -> None:
    base = read_base(REPOSITORY / "models" / "clothing")
    data = replace(DATA, vocabulary=base.config["transformer"]["text_vocab_size"] + 1)
    runs = plan_sizes(data, CPU, Path("run"), Path("pairs"), base=base)[1].runs
    koclip, kodalle = runs["koclip"], runs["kodalle"]
    assert isinstance(koclip, KoclipRun)
    assert isinstance(kodalle, KodalleRun)
    assert koclip.model.text_vocab_size == kodalle.model.text_vocab_size == koclip.text.vocab_size
    assert koclip.model.text_vocab_size > base.config["transformer"]["text_vocab_size"]


def test_a_base_is_a_whole_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--from: .*no such file: give a model folder"):
        read_base(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1, "vqgan": {}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"--from: .*has no transformer"):
        read_base(tmp_path)


def test_small_transformers_train_with_muon_and_large_ones_as_published() -> None:
    small = _plan().trees["kodalle"]
    assert small["deepspeed"]["optimizer"]["type"] == "Muon"
    assert small["weight_decay_on"] == "matrices"
    assert small["model"]["qk_norm"]
    assert small["model"]["zero_init_branches"]
    assert small["model"]["x0_scalars"]
    million = replace(DATA, train=10**6, validation=2000)
    large = plan_sizes(million, GPU, Path("run"), Path("pairs"))[1].trees["kodalle"]
    assert large["deepspeed"]["optimizer"]["type"] == "AdamW"
    assert "qk_norm" not in large["model"]


def test_the_vqgan_computes_in_bfloat16_where_that_is_faster() -> None:
    sizes, plan = plan_sizes(DATA, CPU, Path("run"), Path("pairs"))
    assert "bf16" not in plan.trees["vqgan"]["deepspeed"]
    assert with_bf16(sizes, 0.50, 0.45) == sizes
    faster = with_bf16(sizes, 0.50, 0.30)
    assert faster.reasons["VQGAN's arithmetic"] == (
        "bfloat16", "0.30 s a step on this CPU, 0.50 s in float32; float32 master weights",
    )  # fmt: skip
    trees = make_plan(faster, DATA, Path("run"), Path("pairs")).trees
    assert trees["vqgan"]["deepspeed"]["bf16"] == {"enabled": True}
    assert "bf16" not in trees["koclip"]["deepspeed"]
    assert "bf16" not in trees["kodalle"]["deepspeed"]
