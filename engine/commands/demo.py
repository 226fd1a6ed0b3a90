"""`kodalle demo`: the whole job at a small size, on any machine: a drawn data set, three trainings, scored generations.

    <out>/photos/                 drawn images with K-Fashion labels (engine/data/synthetic/garments.py)
    <out>/pairs/                  prepared pairs: one crop and caption an object
    <out>/vqgan|koclip|kodalle/   training runs; kodalle/model is the finished model folder
    <out>/generations/1…3/        sixteen candidates for three held-out captions
    <out>/evaluation.png          the top-ranked image of every held-out caption, not hand-picked
    <out>/report.json             share of images with the right colour, category, sleeve

Held-out captions are combinations of category, colour and sleeve that no training image shows. A finished step is not
repeated, and an interrupted training is resumed, so running the command again continues the demo.
"""

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.commands.generate import generate_to_folder
from engine.commands.stages import STAGES, TITLES, prepare_once, train_stage
from engine.commands.steps import Steps
from engine.commands.train import check_deepspeed
from engine.config.stages import VqganRun
from engine.config_files import load_run
from engine.data.pairs import Pair, load_pairs
from engine.data.sources import PrepareOptions
from engine.data.synthetic.garments import make_demo
from engine.data.synthetic.oracle import Reading, read, score
from engine.device import pick_device
from engine.errors import InputError
from engine.facts import facts
from engine.files import atomic_file, write_json
from engine.models.folder import read_generation
from engine.pipeline.generation import Generation
from engine.pipeline.image_files import paste_grid
from engine.pipeline.pipeline import Pipeline
from engine.progress import ProgressBar, seconds_text
from engine.training.plan.configs import split_overrides

MEASURES = ("colour", "category", "sleeve", "all")
SHOWN_CAPTIONS = 3
_CAPTIONS_AT_ONCE = 8


def run_demo(
    out: Path,
    configs: Path,
    *,
    images: int = 5000,
    held_out: int = 72,
    candidates: int = 16,
    seed: int = 7,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs every step and writes report.json.

    Args:
        out: folder of the demo.
        configs: folder with vqgan.yaml, koclip.yaml and kodalle.yaml.
        images: drawn for training.
        held_out: captions that are scored.
        candidates: images a caption.
        seed: of the generations.
        overrides: `stage.key=value`, e.g. `vqgan.loop.steps=20` (the tests' tiny demo).

    Raises:
        InputError: a step failed; its own message is above.
    """
    check_deepspeed()
    for stage in STAGES:
        if not (configs / f"{stage}.yaml").is_file():
            raise InputError("--configs", configs, f"has no {stage}.yaml: give configs/demo of the source repository")
    titles = {
        "data": f"drawing {images} images and preparing pairs",
        **TITLES,
        "generation": f"generating images for {SHOWN_CAPTIONS} held-out captions",
        "evaluation": f"scoring {held_out} held-out captions x {candidates} images",
    }
    steps = Steps(titles)
    steps.run("data", lambda: _make_data(out, configs, images, held_out))
    own = split_overrides(overrides)
    for stage in STAGES:
        config = configs / f"{stage}.yaml"
        steps.run(stage, functools.partial(train_stage, stage, config, out, out / "pairs", own[stage]))
    model = out / "kodalle" / "model"
    held = load_pairs(out / "pairs").validation
    steps.run("generation", lambda: _generate(model, out, held, candidates, seed))
    scored: dict[str, Any] = {}
    steps.run("evaluation", lambda: scored.update(_evaluate(model, out, held, candidates, seed)))
    report = {
        "held_out_captions": len(held),
        "candidates": candidates,
        "seed": seed,
        "sampling_params": read_generation(model).model_dump(),
        "share_right": scored,
        "seconds": steps.seconds | {"total": round(steps.total_s, 1)},
        "machine": facts(pick_device("")),
    }
    write_json(out / "report.json", report)
    _print_report(report, out)
    return report


def shipped_configs() -> Path:
    """configs/demo of the checkout; of an installed wheel, where its data files lie."""
    checkout = Path(__file__).parents[2] / "configs" / "demo"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data"), "share/kodalle-engine/configs/demo")


def _make_data(out: Path, configs: Path, images: int, held_out: int) -> None:
    if not (out / "photos").is_dir():
        make_demo(out / "photos", count=images, seed=1, held_out=held_out, progress=True)
    prepare_once(
        out / "photos",
        out / "pairs",
        PrepareOptions(image_size=_image_size(configs), keep_aspect=True, box_margin=0.04),
    )


def _image_size(configs: Path) -> int:
    run = load_run(configs / "vqgan.yaml")
    assert isinstance(run, VqganRun), run.stage
    return run.model.image_size


def _generate(model: Path, out: Path, held: Sequence[Pair], candidates: int, seed: int) -> None:
    """The first captions of three categories."""
    chosen: dict[str, Pair] = {}
    for pair in held:
        chosen.setdefault(str(pair.attributes.get("카테고리")), pair)
    for number, pair in enumerate(list(chosen.values())[:SHOWN_CAPTIONS], start=1):
        generate_to_folder(
            str(model), pair.captions[0], out / "generations" / str(number),
            sampling_params={"candidates": candidates, "top": min(4, candidates), "seed": seed}, strict=False, device="",
        )  # fmt: skip


def _evaluate(model: Path, out: Path, held: Sequence[Pair], candidates: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares of right images: of all candidates (the expectation of one), of the top-ranked ones, and of captions with at
    least one right candidate (the bound of a perfect ranker)."""
    pipeline = Pipeline.from_pretrained(model, device=pick_device(""))
    generations: list[Generation] = []
    with ProgressBar("generating", total=len(held)) as bar:
        for start in range(0, len(held), _CAPTIONS_AT_ONCE):
            captions = [pair.captions[0] for pair in held[start : start + _CAPTIONS_AT_ONCE]]
            generations += pipeline(captions, candidates=candidates, seed=seed)
            bar.update(len(generations))
    shares: dict[str, list[dict[str, bool]]] = {"random": [], "top_ranked": [], "any": []}
    for pair, generation in zip(held, generations, strict=True):
        readings: list[Reading] = [read(one.image) for one in generation.candidates]
        right = score(readings, [pair.attributes] * len(readings))
        shares["random"] += right
        shares["top_ranked"].append(right[0])
        shares["any"].append({measure: any(one[measure] for one in right) for measure in MEASURES})
    best = [generation.candidates[0].image for generation in generations]
    with atomic_file(out / "evaluation.png") as temporary:
        paste_grid(best, columns=12).save(temporary, format="PNG")
    return {
        who: {measure: round(sum(one[measure] for one in ones) / len(ones), 4) for measure in MEASURES}
        for who, ones in shares.items()
    }


def _print_report(report: dict[str, Any], out: Path) -> None:
    print(f"\nheld-out captions: {report['held_out_captions']}, {report['candidates']} images each")
    for who, shares in report["share_right"].items():
        print(f"  {who:<11}" + "".join(f"  {measure} {shares[measure]:.1%}" for measure in MEASURES))
    print(f"{seconds_text(report['seconds']['total'])} in all; see {out / 'report.json'} and {out / 'generations'}")
