"""`kodalle train PHOTOS`: from a folder of captioned images to a model that can be served, and a report that says how good.

    <out>/plan.json, configs/     see engine/commands/train_plan.py
    <out>/check.json, pairs/      findings of the check; prepared pairs
    <out>/vqgan|koclip|kodalle/   training runs
    <out>/model/, choice.json     the finished model folder; which step it is of, where two were compared
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
from pathlib import Path
from typing import Any

from engine.commands.stages import STAGES, TITLES, prepare_once, train_stage
from engine.commands.steps import Steps
from engine.commands.train import check_deepspeed
from engine.commands.train_plan import Request, check_places, facts_of, measured_plan, read_plan, start
from engine.config.stages import VqganRun
from engine.config_files import load_run
from engine.data.check import check
from engine.data.pairs import Pair, load_pairs
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from engine.files import atomic_file, atomic_folder, write_json
from engine.folder_lock import hold_lock
from engine.metrics.oracle import Oracle
from engine.progress import seconds_text
from engine.training.plan.facts import machine_facts
from engine.training.plan.plan import describe_costs

_SEED = 7  # of the evaluation


def train_pictures(request: Request, *, only_plan: bool = False, oracle: Oracle | None = None) -> dict[str, float]:
    """Runs every step that is left; with `only_plan` prints what would be done and what it costs, and writes nothing.

    Args:
        oracle: reads from pixels whether a generation is right, where the data set makes that possible.

    Returns:
        Seconds of the steps in this process, and `total`.

    Raises:
        InputError: no usable images, a changed input, a budget that is too small, another process at work in the folder, or
            a step that failed.
    """
    check_places(request)
    if only_plan:
        plan, costs, other_s = measured_plan(request, facts_of(request), machine_facts())
        print(f"\n{describe_costs(plan, costs, other_s=other_s)}")
        return {}
    check_deepspeed()
    with hold_lock(request.out / ".lock", field="--out"):
        return _run_steps(request, oracle)


def _run_steps(request: Request, oracle: Oracle | None) -> dict[str, float]:
    out, pairs = request.out, request.pairs
    if (out / "plan.json").is_file():
        stored = read_plan(request)
        print(f"{out} goes on as it was planned: see {out / 'plan.json'} and {out / 'configs'}", flush=True)
    else:
        stored = start(request)
    model = out / "model"
    titles = {
        "check": "checking the images and captions",
        "prepare": "using the prepared pairs" if request.is_prepared else "cropping and captioning pairs",
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
    steps.run("model", lambda: _write_model(out, pairs))
    steps.run("evaluation", lambda: _evaluate(model, pairs, out, stored, oracle))
    steps.run("report", lambda: _report(request, pairs, out, stored))
    print(f"{seconds_text(steps.total_s)} in all", flush=True)
    return steps.seconds | {"total": round(steps.total_s, 1)}


def next_commands(out: Path, caption: str) -> list[tuple[str, str]]:
    """(command, what it does) once the model is there."""
    model = shlex.quote(str(out / "model"))
    return [
        (f"kodalle generate {model} {shlex.quote(caption)} --candidates 16 --top 4 --seed 7", "images of a caption"),
        (f"kodalle serve {model} --port 8000", "page and API at http://127.0.0.1:8000"),
    ]


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
        **stored["prepare"],
    )
    report = prepare_once(photos, pairs, options)
    if report is not None:
        print(
            f"{report.train} pairs to train on, {report.validation} held out, {len(report.skipped)} set aside",
            flush=True,
        )
    found = load_pairs(pairs)
    if not found.train or not found.validation:
        # The plan counts files; copies of one photograph stay on one side of the split.
        counts = f"{len(found.train)} pairs to train on and {len(found.validation)} held out are left of its images"
        raise InputError(
            "PHOTOS", photos, f"{counts}: most are copies of each other or were set aside; add different ones"
        )


def _write_model(out: Path, pairs: Path) -> None:
    """Copies the transformer's model folder: of its last step, or, where that is past the best one, of the better of both."""
    from engine.metrics.calibration import calibrate
    from engine.metrics.parts import PARTS
    from engine.models.folder_config import weights_digest

    source = out / "kodalle" / str(_choose_model(out, pairs)["taken"])
    model = out / "model"
    if model.is_dir() and all(weights_digest(model, part) == weights_digest(source, part) for part in PARTS):
        return
    with atomic_folder(model, replace=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        calibrate(folder, pairs)


def _choose_model(out: Path, pairs: Path) -> dict[str, Any]:
    """`model` or `model-best` of the transformer as `taken`, with the scores of both where they were compared; in choice.json.

    A validation loss that rises says that images are memorised, not that generated ones get worse: what they are like for
    held-out captions decides.
    """
    from engine.metrics.caption_score import caption_score
    from engine.models.folder_config import weights_digest
    from engine.training.report.figures import read_log
    from engine.training.report.verdicts import is_past_best

    run, file = out / "kodalle", out / "choice.json"
    if not (run / "model-best").is_dir() or not is_past_best(read_log(run).validation()):
        return {"taken": "model"}
    digests = {name: weights_digest(run / name, "transformer") for name in ("model", "model-best")}
    if file.is_file():
        before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if before["transformers"] == digests:
            return before
    scores = {name: round(caption_score(run / name, pairs, seed=_SEED), 4) for name in digests}
    taken = "model" if scores["model"] > scores["model-best"] else "model-best"
    print(
        f"images of held-out captions score {scores['model']:.2f} at the last step, {scores['model-best']:.2f} at the one of the "
        f"lowest validation loss: the {'last' if taken == 'model' else 'latter'} is taken",
        flush=True,
    )
    choice = {"taken": taken, "scores": scores, "transformers": digests}
    write_json(file, choice)
    return choice


def _evaluate(model: Path, pairs: Path, out: Path, stored: dict[str, Any], oracle: Oracle | None) -> None:
    from engine.metrics.evaluate import evaluate_to_file
    from engine.metrics.parts import PARTS
    from engine.models.folder_config import weights_digest

    file = out / "evaluation.json"
    if file.is_file():
        of = json.loads(file.read_text(encoding="utf-8"))["model"]
        if all(of[part] == weights_digest(model, part) for part in PARTS):
            print(f"{file} is of this model: nothing to do", flush=True)
            return
    evaluate_to_file(
        model, pairs, file, generations=stored["captions"], candidates=stored["candidates"], seed=_SEED, oracle=oracle
    )


def _report(request: Request, pairs: Path, out: Path, stored: dict[str, Any]) -> None:
    from engine.models.folder_config import part_config
    from engine.training.report.figures import code_use, read_log
    from engine.training.report.report import ReportInput, verdict_lines, write_report

    held_out: Sequence[Pair] = load_pairs(pairs).validation
    commands = next_commands(out, held_out[0].captions[0])
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    given = ReportInput(
        title=request.title or f"A model of {request.photos.resolve().name}",
        logs={stage: read_log(out / stage) for stage in STAGES},
        evaluation=evaluation,
        sheet=out / "evaluation.png",
        held_out=held_out,
        code_use=code_use(out / "kodalle" / "shards", part_config(out / "model", "vqgan").codebook_size),
        choices=[(name, value, reason) for name, value, reason in stored["choices"]],
        commands=commands,
        choice=_choose_model(out, pairs),
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
