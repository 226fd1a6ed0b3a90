"""`kodalle train PHOTOS`: from a folder of captioned images to a model that can be served, and a report that says how good.

    <out>/plan.json               what was requested and chosen, seconds expected
    <out>/configs/<stage>.yaml    the three configs; ordinary ones, `kodalle train <out>/configs/vqgan.yaml` trains alone
    <out>/source.txt              the files of PHOTOS, to know whether they are still the same
    <out>/check.json, pairs/      findings of the check; prepared pairs
    <out>/vqgan|koclip|kodalle/   training runs
    <out>/model/                  the finished model folder
    <out>/evaluation.json, .png   held-out figures; top-ranked images of held-out captions
    <out>/report.html, report.md  curves, samples, verdicts, commands

A step that is complete is not repeated and an interrupted training is resumed, so that running the command again goes on.
"""

import functools
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands.stages import STAGES, TITLES, prepare_once, train_stage
from engine.commands.steps import Steps
from engine.commands.train import check_deepspeed
from engine.config.stages import VqganRun
from engine.config_files import load_run
from engine.data.check import check
from engine.data.pairs import Pair, load_pairs
from engine.data.source_listing import first_difference, source_listing
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from engine.files import atomic_file, atomic_folder, read_json, write_json
from engine.progress import seconds_text
from engine.training.plan.configs import read_base, stated_steps
from engine.training.plan.facts import DatasetFacts, MachineFacts, dataset_facts, machine_facts
from engine.training.plan.plan import (
    Plan,
    check_memory,
    describe,
    describe_costs,
    make_plan,
    plan_sizes,
    steps_for,
    views_for,
    with_steps,
    with_views,
)
from engine.training.run_lock import hold_lock

if TYPE_CHECKING:
    from engine.training.plan.cost import StageCost

_PREPARE_S = 0.02  # an image and core, of checking and preparing, for the time that is left
_SEED = 7  # of the evaluation


@dataclass(frozen=True)
class Request:
    """What the user asks of a run; a later call may leave out what it stated before, but not change it."""

    photos: Path
    out: Path
    overrides: tuple[str, ...] = ()
    minutes: float | None = None
    start_from: Path | None = None


def train_pictures(request: Request, *, only_plan: bool = False) -> None:
    """Runs every step that is left; with `only_plan` prints what would be done and what it costs, and writes nothing.

    Raises:
        InputError: no usable images, a changed input, a budget that is too small, another process at work in the folder, or
            a step that failed.
    """
    _check_places(request)
    if only_plan:
        data, machine = dataset_facts(request.photos, start_from=request.start_from), machine_facts()
        plan, costs, other_s = _measured_plan(request, data, machine)
        print(f"\n{describe_costs(plan, costs, other_s=other_s)}")
        return
    check_deepspeed()
    with hold_lock(request.out / ".lock", field="--out"):
        _run_steps(request)


def _run_steps(request: Request) -> None:
    out = request.out
    if (out / "plan.json").is_file():
        stored = _read_plan(request)
        print(f"{out} goes on as it was planned: see {out / 'plan.json'} and {out / 'configs'}", flush=True)
    else:
        stored = _start(request)
    is_prepared = (request.photos / "pairs.jsonl").is_file()
    pairs = request.photos if is_prepared else out / "pairs"
    model = out / "model"
    titles = {
        "check": "checking the images and captions",
        "prepare": "using the prepared pairs" if is_prepared else "cropping and captioning pairs",
        **TITLES,
        "model": "writing the model folder",
        "evaluation": "measuring it on held-out images",
        "report": "writing the report",
    }
    steps = Steps(titles, stored["expected_s"])
    steps.run("check", lambda: _check(request.photos, out))
    steps.run("prepare", lambda: _prepare(request.photos, pairs, out, stored))
    for stage in STAGES:
        config = out / "configs" / f"{stage}.yaml"
        steps.run(stage, functools.partial(train_stage, stage, config, out, pairs, num_processes=stored["processes"]))
    steps.run("model", lambda: _write_model(out))
    steps.run("evaluation", lambda: _evaluate(model, pairs, out, stored))
    steps.run("report", lambda: _report(request, pairs, out, stored))
    print(f"{seconds_text(steps.total_s)} in all", flush=True)


def next_commands(out: Path, caption: str) -> list[tuple[str, str]]:
    """(command, what it does) once the model is there."""
    model = shlex.quote(str(out / "model"))
    return [
        (f"kodalle generate {model} {shlex.quote(caption)} --candidates 16 --top 4 --seed 7", "images of a caption"),
        (f"kodalle serve {model} --port 8000", "page and API at http://127.0.0.1:8000"),
    ]


# ------------------------------------------------------------------------------------------------------------- the plan


def _check_places(request: Request) -> None:
    photos, out = request.photos, request.out
    if not photos.is_dir():
        raise InputError(
            "PHOTOS", photos, "no such folder: give one with name.jpg + name.txt, or with K-Fashion labels"
        )
    if out.resolve().is_relative_to(photos.resolve()):
        raise InputError("--out", out, f"lies inside {photos}: choose a folder outside")
    # What a run leaves that was killed before its plan was written may stay.
    of_a_run = {"configs", "source.txt"}
    held = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if held - of_a_run and "plan.json" not in held:
        raise InputError("--out", out, "holds something other than a run of this command: choose another folder")


def _measured_plan(
    request: Request, data: DatasetFacts, machine: MachineFacts
) -> "tuple[Plan, dict[str, StageCost], float]":
    """The plan with its costs measured here, its steps scaled to the budget if there is one; prints the choices."""
    pairs = request.photos if (request.photos / "pairs.jsonl").is_file() else request.out / "pairs"
    overrides, minutes = request.overrides, request.minutes
    base = None if request.start_from is None else read_base(request.start_from)
    sizes, plan = plan_sizes(data, machine, request.out, pairs, overrides=overrides, minutes=minutes, base=base)
    print("timing a few steps of each stage …", flush=True)
    import torch

    from engine.training.plan.cost import evaluation_seconds, measure_costs, view_seconds

    costs = measure_costs(plan.runs, data.train, torch.device(machine.device))
    check_memory(costs, machine)
    other_s = evaluation_seconds(costs, plan.runs, captions=plan.captions, candidates=plan.candidates)
    other_s += (data.train + data.validation) * _PREPARE_S / machine.cores
    if minutes is not None:
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
        plan = make_plan(sizes, data, request.out, pairs, overrides=overrides, minutes=minutes, base=base)
    print(describe(plan, data, machine))
    return plan, costs, other_s


def _start(request: Request) -> dict[str, Any]:
    """Plans, and writes the plan, the configs and the listing of the source; plan.json is the last of them."""
    from engine.config_files import dump_tree

    listing = source_listing(request.photos)
    data, machine = dataset_facts(request.photos, start_from=request.start_from), machine_facts()
    plan, costs, other_s = _measured_plan(request, data, machine)
    expected_s = {stage: round(costs[stage].seconds(plan.runs[stage].loop.steps or 1)) for stage in STAGES}
    stored = {
        "photos": str(request.photos),
        "overrides": list(request.overrides),
        "minutes": request.minutes,
        "start_from": None if request.start_from is None else str(request.start_from),
        "split_fraction": data.split_fraction,
        "split_seed": data.split_seed,
        "processes": max(1, machine.gpus),
        "captions": plan.captions,
        "candidates": plan.candidates,
        "expected_s": expected_s | {"evaluation": round(other_s)},
        "choices": [[name, value, reason] for name, (value, reason) in plan.reasons.items()],
    }
    out = request.out
    for stage, tree in plan.trees.items():
        with atomic_file(out / "configs" / f"{stage}.yaml") as temporary:
            temporary.write_text(dump_tree(tree), encoding="utf-8")
    with atomic_file(out / "source.txt") as temporary:
        temporary.write_text(listing, encoding="utf-8")
    write_json(out / "plan.json", stored)
    return stored


def _read_plan(request: Request) -> dict[str, Any]:
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
    for option, before, now in (
        ("--minutes", stored["minutes"], request.minutes),
        ("--from", stored["start_from"], None if request.start_from is None else str(request.start_from)),
        ("--set", stored["overrides"], list(request.overrides)),
    ):
        if now and now != before:
            shown = ", ".join(now) if isinstance(now, list) else now
            raise InputError(
                option,
                shown,
                f"{out} was planned with {before or 'none'}: choose another --out, or edit {out / 'configs'}",
            )
    return stored


# ------------------------------------------------------------------------------------------------------------ the steps


def _check(photos: Path, out: Path) -> None:
    """Names what is wrong with the source; faulty records are set aside by the preparation, which stops at too many."""
    file = out / "check.json"
    if not file.is_file():
        write_json(file, check(photos, workers=os.cpu_count() or 1, progress=True).to_json())
    found = json.loads(file.read_text(encoding="utf-8"))
    print(f"{found['images']} images: {found['errors']} errors, {found['warnings']} warnings", flush=True)
    for one in found["findings"][:10]:
        print(f"  {one['severity']}: {one['record']}: {one['detail']}")
    if len(found["findings"]) > 10:
        print(f"  … all of them are in {file}")


def _prepare(photos: Path, pairs: Path, out: Path, stored: dict[str, Any]) -> None:
    vqgan = load_run(out / "configs" / "vqgan.yaml")
    assert isinstance(vqgan, VqganRun), vqgan.stage
    options = PrepareOptions(
        image_size=vqgan.model.image_size,
        keep_aspect=True,
        box_margin=0.05,
        validation_fraction=stored["split_fraction"],
        seed=stored["split_seed"],
    )
    report = prepare_once(photos, pairs, options)
    if report is not None:
        print(
            f"{report.train} pairs to train on, {report.validation} held out, {len(report.skipped)} set aside",
            flush=True,
        )


def _write_model(out: Path) -> None:
    """Copies the transformer's model folder: that of its best step where the last one is past it."""
    from engine.metrics.parts import PARTS
    from engine.models.folder import weights_digest
    from engine.training.report.figures import read_log
    from engine.training.report.verdicts import is_past_best

    source = out / "kodalle" / "model"
    best = out / "kodalle" / "model-best"
    if best.is_dir() and is_past_best(read_log(out / "kodalle").validation()):
        source = best
    model = out / "model"
    if model.is_dir() and all(weights_digest(model, part) == weights_digest(source, part) for part in PARTS):
        return
    with atomic_folder(model, replace=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _evaluate(model: Path, pairs: Path, out: Path, stored: dict[str, Any]) -> None:
    from engine.metrics.evaluate import evaluate_to_file
    from engine.metrics.parts import PARTS
    from engine.models.folder import weights_digest

    file = out / "evaluation.json"
    if file.is_file():
        of = json.loads(file.read_text(encoding="utf-8"))["model"]
        if all(of[part] == weights_digest(model, part) for part in PARTS):
            print(f"{file} is of this model: nothing to do", flush=True)
            return
    evaluate_to_file(model, pairs, file, generations=stored["captions"], candidates=stored["candidates"], seed=_SEED)


def _report(request: Request, pairs: Path, out: Path, stored: dict[str, Any]) -> None:
    from engine.models.folder import part_config
    from engine.training.report.figures import code_use, read_log
    from engine.training.report.report import ReportInput, verdict_lines, write_report

    held_out: Sequence[Pair] = load_pairs(pairs).validation
    commands = next_commands(out, held_out[0].captions[0])
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    given = ReportInput(
        title=f"A model of {request.photos.name}",
        logs={stage: read_log(out / stage) for stage in STAGES},
        evaluation=evaluation,
        sheet=out / "evaluation.png",
        held_out=held_out,
        code_use=code_use(out / "kodalle" / "shards", part_config(out / "model", "vqgan").codebook_size),
        choices=[(name, value, reason) for name, value, reason in stored["choices"]],
        commands=commands,
    )
    lines = verdict_lines(write_report(out, given))
    _write_card(out, lines)
    print("\n".join(["", *lines, "", f"the report: {out / 'report.html'}", *(command for command, _ in commands)]))


def _write_card(out: Path, lines: Sequence[str]) -> None:
    """The card that training wrote, and how good the model is."""
    heading = "## How good is it"
    card = out / "model" / "model_card.md"
    trained = card.read_text(encoding="utf-8").partition(heading)[0].rstrip()
    text = "\n".join([trained, "", heading, "", *lines, ""])
    with atomic_file(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
