"""`kodalle train PHOTOS --from IMPORTED`: training a transformer further on captioned images, codec and ranker as they are.

    <out>/pairs/                  prepared pairs, at the codec's size
    <out>/configs/kodalle.yaml    the config: an ordinary one
    <out>/fine_tuning.json        what was requested, written last
    <out>/kodalle/                the training run; <out>/kodalle/model is the model

Run again, it goes on where it was.
"""

import shlex
from pathlib import Path

from engine.commands.stages import prepare_once, run_stage
from engine.commands.train import check_deepspeed
from engine.config_files import dump_tree, load_run, parse_run
from engine.config_folders import check_folders
from engine.data.pairs import load_pairs
from engine.data.source_listing import first_difference, source_listing
from engine.data.sources import PrepareOptions
from engine.errors import InputError
from engine.files import atomic_file, held_names, lies_within, read_json, write_json
from engine.folder_lock import hold_lock
from engine.models.folder_config import part_config
from engine.training.plan.configs import read_base
from engine.training.plan.facts import dataset_facts, machine_facts
from engine.training.plan.fine_tuning import fine_tuning_tree

_CONFIG, _REQUEST = Path("configs/kodalle.yaml"), "fine_tuning.json"


def keeps_its_codec(folder: Path) -> bool:
    """Whether a model is trained on in its transformer alone: it has no ranker, as imported ones, or a codec that is no VQGAN."""
    config = read_json(folder / "config.json", field="--from", remedy="give a model folder, e.g. one of kodalle import")
    if "transformer" not in config or "vqgan" not in config:
        return False
    return "koclip" not in config or config["vqgan"].get("family", "vqgan") != "vqgan"


def fine_tune(photos: Path, start_from: Path, out: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Prepares the images, trains, and returns the model's folder.

    Raises:
        InputError: too few images, a changed input, an override that does not fit, or a training that failed.
    """
    check_deepspeed()
    if lies_within(out, photos):
        raise InputError("--out", out, f"lies inside {photos}: choose a folder outside")
    held = {name for name in held_names(out) if not name.startswith(".")} if out.is_dir() else set()
    if held - {"pairs", "configs"} and _REQUEST not in held:
        raise InputError("--out", out, "holds something other than a run of this command: choose another folder")
    with hold_lock(out / ".lock", field="--out"):
        if _REQUEST in held:
            _check_request(photos, start_from, out, overrides)
        else:
            _start(photos, start_from, out, overrides)
        run_stage("kodalle", out / _CONFIG, out / "kodalle", num_processes=max(1, machine_facts().gpus))
    model = out / "kodalle" / "model"
    caption = load_pairs(_pairs_folder(photos, out)).all[0].captions[0]
    print(f"the model: {model}")
    print(f"kodalle generate {shlex.quote(str(model))} {shlex.quote(caption)} --candidates 16 --top 4 --seed 7")
    print(f"kodalle serve {shlex.quote(str(model))} --port 8000")
    return model


def _pairs_folder(photos: Path, out: Path) -> Path:
    return photos if (photos / "pairs.jsonl").is_file() else out / "pairs"


def _start(photos: Path, start_from: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Prepares the images and writes the config, and last what was requested."""
    base, size = read_base(start_from), part_config(start_from, "vqgan").image_size
    folder = _pairs_folder(photos, out)
    if folder != photos:
        facts = dataset_facts(photos, cut_out=False)
        options = PrepareOptions(
            image_size=size,
            keep_aspect=True,
            box_margin=0.05,
            validation_fraction=facts.split_fraction,
            seed=facts.split_seed,
        )
        report = prepare_once(photos, folder, options)
        if report is not None:
            print(f"{report.train} pairs to train on, {report.validation} held out, {len(report.skipped)} set aside")
    tree = fine_tuning_tree(base, out, folder, load_pairs(folder), machine_facts(), overrides)
    check_folders(parse_run(tree, source="--set"))
    with atomic_file(out / _CONFIG) as temporary:
        temporary.write_text(dump_tree(tree), encoding="utf-8")
    request = {"photos": str(photos), "start_from": str(start_from), "overrides": list(overrides)}
    write_json(out / _REQUEST, request | {"listing": source_listing(photos)})


def _check_request(photos: Path, start_from: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Raises InputError: another request than that which the run was started with."""
    stored = read_json(out / _REQUEST, field="--out", remedy="choose another folder")
    difference = first_difference(stored["listing"], source_listing(photos))
    if difference is not None:
        raise InputError("PHOTOS", photos, f"{out} was started with other files: {difference}; choose another --out")
    for option, before, now in (
        ("--from", stored["start_from"], str(start_from)),
        ("--set", ", ".join(stored["overrides"]), ", ".join(overrides)),
    ):
        if now and now != before:
            remedy = f"{out} was started with {before or 'none'}: choose another --out, or edit {out / _CONFIG}"
            raise InputError(option, now, remedy)
    load_run(out / _CONFIG)
