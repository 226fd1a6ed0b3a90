"""What `kodalle train PHOTOS` requests, and the plan that is made of it once and kept in the run's folder.

<out>/plan.json               what was requested and chosen, how pairs are prepared, seconds expected
<out>/configs/<stage>.yaml    the three configs; ordinary ones, `kodalle train <out>/configs/vqgan.yaml` trains alone
<out>/source.txt              the files of PHOTOS, to know whether they are still the same
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.stages import VqganRun
from engine.config_files import dump_tree
from engine.data.source_listing import first_difference, source_listing
from engine.errors import InputError
from engine.files import atomic_file, held_names, lies_within, read_json, write_json
from engine.training.plan.configs import read_base, stated_steps
from engine.training.plan.facts import DatasetFacts, MachineFacts, dataset_facts, machine_facts
from engine.training.plan.plan import (
    Plan,
    check_memory,
    describe,
    make_plan,
    plan_sizes,
    preset_plan,
    steps_for,
    views_for,
    with_bf16,
    with_steps,
    with_views,
)
from engine.training.plan.sizes import STAGES

if TYPE_CHECKING:
    from engine.training.plan.cost import StageCost

_PREPARE_S = 0.02  # an image and core, of checking and preparing, for the time that is left
_NOTED_SLOWDOWN = 2.0
_STORED_OPTIONS = {"--minutes": "minutes", "--from": "start_from", "--set": "overrides", "--cut-out": "cut_out"}


@dataclass(frozen=True)
class Preset:
    """Choices that were tried on a data set, in the place of the table's.

    configs: folder with vqgan.yaml, koclip.yaml and kodalle.yaml; places in them are replaced by those of the run.
    box_margin, cut_out: of the preparation.
    captions, candidates: of the evaluation.
    """

    configs: Path
    box_margin: float
    cut_out: bool
    captions: int
    candidates: int


@dataclass(frozen=True)
class Request:
    """What the user asks of a run; a later call may leave out what it stated before, but not change it.

    title: of the report; default: by the folder of the images.
    cut_out: objects without their background; None: where enough of them have an outline.
    preset: in the place of what the table chooses.
    """

    photos: Path
    out: Path
    overrides: tuple[str, ...] = ()
    minutes: float | None = None
    start_from: Path | None = None
    cut_out: bool | None = None
    preset: Preset | None = None
    title: str = ""

    @property
    def is_prepared(self) -> bool:
        """Whether the images come as a prepared folder."""
        return (self.photos / "pairs.jsonl").is_file()

    @property
    def pairs(self) -> Path:
        return self.photos if self.is_prepared else self.out / "pairs"

    def options(self) -> dict[str, Any]:
        """Those that a later call may not change, as plan.json has them."""
        return {
            "overrides": list(self.overrides),
            "minutes": self.minutes,
            "start_from": None if self.start_from is None else str(self.start_from),
            "cut_out": self.cut_out,
        }


def check_places(request: Request) -> None:
    """Raises InputError: no such folder, or one for the run that cannot be used."""
    photos, out = request.photos, request.out
    if not photos.is_dir():
        raise InputError(
            "PHOTOS", photos, "no such folder: give one with name.jpg + name.txt, or with K-Fashion labels"
        )
    if lies_within(out, photos):
        raise InputError("--out", out, f"lies inside {photos}: choose a folder outside")
    if request.is_prepared and request.cut_out is not None:
        raise InputError("--cut-out", photos, "is prepared already, with or without background: leave the option out")
    # What a run leaves that was killed before its plan was written may stay.
    of_a_run = {"configs", "source.txt"} | (
        {photos.name} if Path(os.path.realpath(photos)).parent == Path(os.path.realpath(out)) else set()
    )
    held = {name for name in held_names(out) if not name.startswith(".")} if out.is_dir() else set()
    if held - of_a_run and "plan.json" not in held:
        raise InputError("--out", out, "holds something other than a run of this command: choose another folder")


def measured_plan(
    request: Request, data: DatasetFacts, machine: MachineFacts
) -> "tuple[Plan, dict[str, StageCost], float]":
    """The plan with its costs measured here, its steps scaled to the budget if there is one; prints the choices.

    Returns:
        Also seconds for what is no training: preparation and evaluation.
    """
    overrides, minutes = request.overrides, request.minutes
    base = None if request.start_from is None else read_base(request.start_from)
    sizes = None
    if request.preset is not None:
        plan = preset_plan(
            request.preset.configs, request.out, request.pairs, data, overrides=overrides,
            captions=request.preset.captions, candidates=request.preset.candidates,
        )  # fmt: skip
    else:
        sizes, plan = plan_sizes(
            data, machine, request.out, request.pairs, overrides=overrides, minutes=minutes, base=base
        )
    print("timing a few steps of each stage …", flush=True)
    import torch

    from engine.training.plan.cost import evaluation_seconds, measure_costs, view_seconds, vqgan_cost_in_bf16

    device = torch.device(machine.device)
    costs = measure_costs(plan.runs, data.train, device)
    vqgan = plan.runs["vqgan"]
    if machine.multiplies_bf16 and sizes is not None and isinstance(vqgan, VqganRun) and "bf16" not in vqgan.deepspeed:
        in_bf16 = vqgan_cost_in_bf16(vqgan, device, costs["vqgan"])
        sizes = with_bf16(sizes, costs["vqgan"].step_s, in_bf16.step_s)
        if sizes.bf16_on_cpu:
            costs["vqgan"] = in_bf16
            plan = make_plan(sizes, data, request.out, request.pairs, overrides=overrides, minutes=minutes, base=base)
    check_memory(costs, machine)
    slowdown = max(cost.slowdown for cost in costs.values())
    if slowdown > _NOTED_SLOWDOWN:
        print(
            f"note: other programs have the processors: a step takes {slowdown:.0f} times as long as expected without them"
        )
    other_s = evaluation_seconds(costs, plan.runs, captions=plan.captions, candidates=plan.candidates)
    other_s += (data.train + data.validation) * _PREPARE_S / machine.cores
    if minutes is not None and sizes is not None:
        view_s = view_seconds(costs["vqgan"], plan.runs["vqgan"], data.train)
        views = views_for(minutes, sizes.augmented_views, view_s)
        if views < sizes.augmented_views:
            saved_s = (sizes.augmented_views - views) * view_s
            costs["kodalle"] = replace(costs["kodalle"], fixed_s=costs["kodalle"].fixed_s - saved_s)
            sizes = with_views(sizes, views, f"more would take over a tenth of {minutes:g} minutes to encode")
        planned = {stage: run.loop.steps or 1 for stage, run in plan.runs.items()}
        stated = stated_steps(overrides)
        steps = steps_for(minutes, costs, planned, stated=stated, other_s=other_s)
        sizes = with_steps(sizes, steps, f"what fits {minutes:g} minutes")
        plan = make_plan(sizes, data, request.out, request.pairs, overrides=overrides, minutes=minutes, base=base)
    print(describe(plan, data, machine))
    return plan, costs, other_s


def facts_of(request: Request) -> DatasetFacts:
    """Facts of the images, for the plan."""
    cut_out = request.cut_out if request.preset is None else request.preset.cut_out
    return dataset_facts(request.photos, start_from=request.start_from, cut_out=cut_out)


def start(request: Request) -> dict[str, Any]:
    """Plans, and writes the plan, the configs and the listing of the source; plan.json is the last of them."""
    listing = source_listing(request.photos)
    data, machine = facts_of(request), machine_facts()
    plan, costs, other_s = measured_plan(request, data, machine)
    expected_s = {stage: round(costs[stage].seconds(plan.runs[stage].loop.steps or 1)) for stage in STAGES}
    margin = 0.06 if data.ground else 0.05
    stored = {"photos": str(request.photos)} | request.options() | {
        "prepare": {
            "box_margin": margin if request.preset is None else request.preset.box_margin,
            "cut_out": data.ground is not None,
            "ground": data.ground,
            "validation_fraction": data.split_fraction,
            "seed": data.split_seed,
        },
        "processes": max(1, machine.gpus),
        "captions": plan.captions,
        "candidates": plan.candidates,
        "expected_s": expected_s | {"evaluation": round(other_s)},
        "choices": [[name, value, reason] for name, (value, reason) in plan.reasons.items()],
    }  # fmt: skip
    out = request.out
    for stage, tree in plan.trees.items():
        with atomic_file(out / "configs" / f"{stage}.yaml") as temporary:
            temporary.write_text(dump_tree(tree), encoding="utf-8")
    with atomic_file(out / "source.txt") as temporary:
        temporary.write_text(listing, encoding="utf-8")
    write_json(out / "plan.json", stored)
    return stored


def read_plan(request: Request) -> dict[str, Any]:
    """The stored plan of a run that was started before.

    Raises:
        InputError: the source or an option is not what it was started with, by name.
    """
    out = request.out
    stored: dict[str, Any] = read_json(out / "plan.json", field="--out", remedy="choose another folder")
    difference = first_difference((out / "source.txt").read_text(encoding="utf-8"), source_listing(request.photos))
    if difference is not None:
        raise InputError(
            "PHOTOS",
            request.photos,
            f"{out} was started with other files: {difference}; choose another --out, or undo it",
        )
    stated = request.options()
    for option, name in _STORED_OPTIONS.items():
        now, before = stated[name], stored[name]
        if now not in (None, []) and now != before:
            shown = ", ".join(now) if isinstance(now, list) else now
            was = "none" if before in (None, []) else before
            raise InputError(
                option, shown, f"{out} was planned with {was}: choose another --out, or edit {out / 'configs'}"
            )
    return stored
