"""The plan of a whole training: chosen sizes, the configs made of them, what they cost here, and how that fits a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from engine.progress import seconds_text
from engine.training.plan.configs import AnyRun, Base, make_trees, parse_trees, preset_trees, stated_steps
from engine.training.plan.facts import DatasetFacts, MachineFacts
from engine.training.plan.sizes import GIB, STAGES, Schedule, Sizes, choose_sizes, with_base

if TYPE_CHECKING:
    from engine.training.plan.cost import StageCost

# Shares of the time for steps, from configs/clothing: 74, 4 and 73 minutes, where the ranker could have used more.
_SHARES = {"vqgan": 0.45, "koclip": 0.1, "kodalle": 0.45}
_LEAST_STEPS = 20
_FASTER = 1.2  # from which another arithmetic is chosen


@dataclass(frozen=True)
class Plan:
    """What will be trained. `trees` are the configs as YAML holds them, `reasons` a (value, reason) for each choice."""

    trees: dict[str, dict[str, Any]]
    runs: dict[str, AnyRun]
    reasons: dict[str, tuple[str, str]]
    captions: int  # held-out ones that the evaluation generates images for
    candidates: int


def plan_sizes(
    data: DatasetFacts,
    machine: MachineFacts,
    out: Path,
    pairs: Path,
    *,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    base: Base | None = None,
) -> tuple[Sizes, Plan]:
    """The plan before anything is measured: what the table says, with `--set` applied.

    Raises:
        InputError: a budget or an override that cannot be.
    """
    if minutes is not None and not minutes > 0:
        raise InputError("--minutes", minutes, "give a number above 0")
    sizes = choose_sizes(data, machine, minutes=minutes)
    if base is not None:
        sizes = with_base(sizes, base.config, str(base.folder))
    sizes = with_steps(sizes, stated_steps(overrides), "as --set states")
    return sizes, make_plan(sizes, data, out, pairs, overrides=overrides, minutes=minutes, base=base)


def make_plan(
    sizes: Sizes,
    data: DatasetFacts,
    out: Path,
    pairs: Path,
    *,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    base: Base | None = None,
) -> Plan:
    """The configs of chosen sizes."""
    trees = make_trees(sizes, out, pairs, overrides, base=base)
    short = minutes is not None and minutes < 30
    return Plan(
        trees=trees,
        runs=parse_trees(trees, "the plan with --set" if overrides else "the plan"),
        reasons=sizes.reasons
        | {f"--set {text.partition('=')[0]}": (text.partition("=")[2], "as stated") for text in overrides},
        captions=min(12 if short else 40, data.validation),
        candidates=8 if short else 16,
    )


def preset_plan(
    configs: Path,
    out: Path,
    pairs: Path,
    data: DatasetFacts,
    *,
    overrides: Sequence[str],
    captions: int,
    candidates: int,
) -> Plan:
    """The plan of given configs; what is printed of it is read from them.

    Raises:
        InputError: a config that is missing or wrong, or an override that fits no field.
    """
    trees = preset_trees(configs, out, pairs, overrides)
    runs = parse_trees(trees, str(configs))
    where = f"as in {configs}"
    vqgan, kodalle = trees["vqgan"]["model"], trees["kodalle"]["model"]
    grid = kodalle["image_grid_size"]
    reasons = {
        "held out": (f"{data.validation} of {data.train + data.validation} pairs", "by the data set itself"),
        "background": (f"cut out, {data.ground} instead" if data.ground else "kept", "as these sizes were tried"),
        "image size": (f"{vqgan['image_size']} x {vqgan['image_size']} pixels", where),
        "image tokens": (f"{grid} x {grid} of {vqgan['codebook_size']}", where),
        "transformer": (f"{kodalle['num_layers']} layers of {kodalle['dim']}", where),
    }
    for stage, run in runs.items():
        batch = run.deepspeed["train_micro_batch_size_per_gpu"]
        reasons[f"{stage} steps"] = (f"{run.loop.steps:,} of {batch} images", where)
    return Plan(trees, runs, reasons, captions=min(captions, data.validation), candidates=candidates)


def with_steps(sizes: Sizes, steps: Mapping[str, int], reason: str) -> Sizes:
    """The sizes with other numbers of steps for some stages."""
    schedules, reasons = dict(sizes.schedules), dict(sizes.reasons)
    for stage, number in steps.items():
        schedules[stage] = Schedule(number, schedules[stage].batch)
        reasons[f"{stage} steps"] = (f"{number:,} of {schedules[stage].batch} images", reason)
    return replace(sizes, schedules=schedules, reasons=reasons)


def with_bf16(sizes: Sizes, float_s: float, bf16_s: float) -> Sizes:
    """The sizes with a VQGAN in bfloat16 where a step of it is clearly faster on this CPU.

    Args:
        float_s, bf16_s: seconds of a step in float32 and in bfloat16.
    """
    if bf16_s * _FASTER > float_s:
        return sizes
    value = ("bfloat16", f"{bf16_s:.2f} s a step on this CPU, {float_s:.2f} s in float32; float32 master weights")
    return replace(sizes, bf16_on_cpu=True, reasons=sizes.reasons | {"VQGAN's arithmetic": value})


def views_for(minutes: float, planned: int, view_s: float) -> int:
    """Augmented views of which encoding takes a tenth of a budget at most, and no more than planned.

    Args:
        view_s: seconds to encode one view of every training image.
    """
    return min(planned, int(minutes * 60 / 10 / view_s))


def with_views(sizes: Sizes, views: int, reason: str) -> Sizes:
    """The sizes with fewer augmented views."""
    return replace(
        sizes, augmented_views=views, reasons=sizes.reasons | {"augmented views": (f"{views} an image", reason)}
    )


def steps_for(
    minutes: float,
    costs: "Mapping[str, StageCost]",
    planned: Mapping[str, int],
    *,
    stated: Mapping[str, int],
    other_s: float,
) -> dict[str, int]:
    """Steps of each stage that fit a budget: never more than twice the planned ones, which were enough before.

    Args:
        minutes: for everything.
        planned: steps of the plan without a budget.
        stated: steps that may not change.
        other_s: seconds for preparation and evaluation.

    Raises:
        InputError: too few minutes for `_LEAST_STEPS` steps of each stage.
    """
    fixed_s = other_s + sum(cost.fixed_s for cost in costs.values())
    fixed_s += sum(number * costs[stage].step_s for stage, number in stated.items())
    free = [stage for stage in STAGES if stage not in stated]
    left_s = minutes * 60 - fixed_s
    least_s = sum(_LEAST_STEPS * costs[stage].step_s for stage in free)
    if left_s < least_s:
        needed = (fixed_s + 2 * least_s) / 60
        raise InputError("--minutes", f"{minutes:g}", f"are too few on this machine: give {needed:.0f} or more")
    steps: dict[str, int] = {}
    # A stage that needs less than its share leaves the rest to the others.
    for stage in sorted(free, key=lambda name: planned[name] * costs[name].step_s / _SHARES[name]):
        open_stages = [name for name in free if name not in steps]
        share = _SHARES[stage] / sum(_SHARES[name] for name in open_stages)
        number = int(share * left_s / costs[stage].step_s)
        steps[stage] = max(_LEAST_STEPS, min(number, 2 * planned[stage]))
        left_s -= steps[stage] * costs[stage].step_s
    return steps


def describe(plan: Plan, data: DatasetFacts, machine: MachineFacts) -> str:
    """Every choice with its reason, one a line."""
    rows = [(name, value, reason) for name, (value, reason) in plan.reasons.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    memory = f"{machine.memory_bytes / GIB:.0f} GiB"
    where = (
        f"{machine.gpus} x {machine.name}, {memory}"
        if machine.gpus
        else f"{machine.name}, {machine.cores} cores, {memory}"
    )
    lines = [f"{data.train + data.validation:,} captioned images; {where}", ""]
    lines += [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows]
    return "\n".join(lines)


def describe_costs(plan: Plan, costs: "Mapping[str, StageCost]", *, other_s: float) -> str:
    """Parameters, memory by part and minutes by stage."""
    header = (
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "memory",
        "steps",
        "a step",
        "minutes",
    )
    rows: list[tuple[str, ...]] = [header]
    total_s = other_s
    for stage, cost in costs.items():
        steps = plan.runs[stage].loop.steps or 0
        seconds = cost.seconds(steps)
        total_s += seconds
        sizes = (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.activation_bytes, cost.memory_bytes)
        megabytes = [f"{size / 2**20:,.0f} MiB" for size in sizes]
        rows.append(
            (stage, f"{cost.parameters:,}", *megabytes, f"{steps:,}", f"{cost.step_s:.3f} s", f"{seconds / 60:.1f}")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"preparation and evaluation about {seconds_text(other_s)}; {seconds_text(total_s)} in all")
    return "\n".join(lines)


def check_memory(costs: "Mapping[str, StageCost]", machine: MachineFacts) -> None:
    """Raises InputError for a stage that needs more memory than there is."""
    for stage, cost in costs.items():
        if cost.memory_bytes > 0.9 * machine.memory_bytes:
            raise InputError(
                f"{stage}.deepspeed.train_micro_batch_size_per_gpu",
                f"{cost.memory_bytes / GIB:.1f} GiB",
                f"is more than 90 % of the {machine.memory_bytes / GIB:.1f} GiB here: halve it with --set, and set "
                f"{stage}.deepspeed.gradient_accumulation_steps=2",
            )
