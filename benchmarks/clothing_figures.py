"""Every figure of a model of clothes on held-out photographs, and the sheets that show it.

    kodalle train-classifier data/clothing128 --out runs/clothing/classifier
    python benchmarks/clothing_figures.py runs/clothing/kodalle/model data/clothing128 \
        --independent-classifier runs/clothing/classifier

`kodalle evaluate` twice, for whole captions and for captions with sentences left out, and its numbers beside the bars that the
project set itself. Written into benchmarks/results/clothing/ (`--out`): figures.json, and beside it sheet.png (top-ranked
images without captions, to be named before reading), sheet-captioned.png, sheet-large.png, sheet-nearest.png (each beside its
nearest training photograph) and sheet-reconstructions.png. Nothing on them is chosen by hand. The sheets show 40 captions;
shares are of `--captions`, and the standard error of a share of 40 is up to 8 points, of 100 up to 5.

`--distance-images` are the generations for FID and KID: with fewer than 2,000 in a hurry both sides of the comparison still
have equally many (`reconstructed_training_images`), and the document says how many. `--quick` tries the script: its figures are
no record and go to runs/benchmarks/.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine_facts import REPOSITORY, print_document, stored_path
from text_table import NOT_MEASURED, table

from engine.device import pick_device
from engine.errors import InputError
from engine.facts import facts
from engine.files import write_json
from engine.metrics.evaluate import evaluate
from engine.metrics.independent_classifier import LEAST_ACCURACY
from engine.progress import PhaseBars, seconds_text

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A number beside what it must reach.

    Args:
        value: None: not measured.
        of: what it was measured on.
        random: the same of a candidate taken at random, or of a guess.
        real: the same of the real photographs.
        bar, stretch: to be reached; None: none was set.
        least_is_best: a bar is an upper bound.
    """

    what: str
    value: float | None
    of: str
    random: float | None = None
    real: float | None = None
    bar: float | None = None
    stretch: float | None = None
    least_is_best: bool = False

    @property
    def reached(self) -> str:
        """`stretch`, `bar` or `missed`; `stored` where nothing was to be reached."""
        if self.value is None:
            return NOT_MEASURED
        sign = -1 if self.least_is_best else 1
        for name, goal in (("stretch", self.stretch), ("bar", self.bar)):
            if goal is not None and sign * self.value >= sign * goal:
                return name
        return "missed" if self.bar is not None or self.stretch is not None else "stored"


def main() -> int:
    arguments = _arguments()
    try:
        document = measure(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(arguments.out / "figures.json", document)
    print(f"stored {arguments.out / 'figures.json'}", file=sys.stderr, flush=True)
    print(_table(document), end="\n\n")
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument(
        "--independent-classifier", type=Path, required=True, help="folder of `kodalle train-classifier`"
    )
    parser.add_argument("--captions", type=int, help="held-out captions to generate images for (100)")
    parser.add_argument("--candidates", type=int, help="images of each caption (16)")
    parser.add_argument("--distance-images", type=int, help="generations for FID and KID (2000); 0: none")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 captions, 2 candidates, no FID, unless given")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/clothing)")
    arguments = parser.parse_args()
    counts = {"captions": (100, 3), "candidates": (16, 2), "distance_images": (2000, 0)}
    for name, (whole, quick) in counts.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else whole)
    root = REPOSITORY / "runs" if arguments.quick else REPOSITORY
    arguments.out = arguments.out or root / "benchmarks" / "results" / "clothing"
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document of `figures.json`; writes the sheets.

    Raises:
        InputError: from `evaluate`.
    """
    machine = facts(pick_device(""))  # before anything is computed: the commit, the load
    arguments.out.mkdir(parents=True, exist_ok=True)
    reports = {}
    with PhaseBars() as bars:
        for way in ("whole", "partial"):
            whole = way == "whole"
            reports[way] = evaluate(
                arguments.model, arguments.pairs,
                generations=arguments.captions, candidates=arguments.candidates, seed=arguments.seed,
                independent_classifier=arguments.independent_classifier, partial_captions=not whole,
                distance_images=arguments.distance_images if whole else 0,
                sheets=arguments.out / "sheet.png" if whole else None, on_progress=bars.update,
            )  # fmt: skip
    return {
        "benchmark": "clothing_figures",
        **machine,
        "model": stored_path(arguments.model),
        "pairs": stored_path(arguments.pairs),
        "config": {
            name: getattr(arguments, name) for name in ("captions", "candidates", "distance_images", "seed", "quick")
        },
        "figures": [asdict(figure) | {"reached": figure.reached} for figure in figures(**reports)],
        "whole_captions": reports["whole"],
        "partial_captions": {name: reports["partial"][name] for name in ("generations", "seconds")},
    }


def figures(whole: Report, partial: Report) -> list[Figure]:
    """The figures of two reports of `evaluate`; what a report lacks is not measured."""
    koclip, generations = whole.get("koclip", {}), whole.get("generations", {})
    classifier, reconstruction = whole.get("independent_classifier", {}), whole.get("reconstruction", {})
    among = koclip.get("recall_among")
    of_recall = f"{koclip.get('pairs')} photographs, among {among} captions"
    garment_class, both = generations.get("class_agreement", {}), generations.get("colour_and_class_agreement", {})
    fitting = partial["generations"].get("class_agreement", {})
    return [
        Figure(
            "KoCLIP: right caption first", koclip.get("recall_at_1"), of_recall,
            random=1 / among if among else None, bar=0.40, stretch=0.50,
        ),
        Figure(
            "KoCLIP: right caption among five", koclip.get("recall_at_5"), of_recall,
            random=min(1.0, 5 / among) if among else None, bar=0.78, stretch=0.85,
        ),
        Figure(
            "independent classifier names held-out photographs rightly", classifier.get("accuracy"),
            f"{classifier.get('images')} photographs", random=classifier.get("majority"), bar=LEAST_ACCURACY,
        ),
        _agreement("colour read from the pixels is that of the caption", generations.get("colour_agreement", {}), 0.90, 0.95),
        _agreement("garment class, by the independent classifier, is that of the caption", garment_class, 0.85, 0.92),
        _agreement("colour and class", both, None, None),
        Figure(
            "colour and class: top-ranked minus random", both.get("top_ranked_minus_random"), _captions(both),
            bar=0.08, stretch=0.15,
        ),
        _agreement("partial captions: the class is one that fits", fitting, 0.90, None),
        Figure(
            "reconstruction, dB", reconstruction.get("psnr_db"), f"{reconstruction.get('images')} photographs", bar=25.0
        ),
        *_distances(generations),
    ]  # fmt: skip


def _agreement(what: str, shares: Report, bar: float | None, stretch: float | None) -> Figure:
    return Figure(
        f"{what}, top-ranked", shares.get("top_ranked"), _captions(shares),
        random=shares.get("random"), real=shares.get("real"), bar=bar, stretch=stretch,
    )  # fmt: skip


def _captions(shares: Report) -> str:
    return f"{shares.get('num_captions')} captions"


def _distances(generations: Report) -> list[Figure]:
    """FID over that of the codec's reconstructions of the held-out photographs; copies of training photographs."""
    found = []
    for to, name in (("to_held_out", "held-out"), ("to_training", "training")):
        rows = generations.get("distances", {}).get(to, {})
        fid = {row: numbers["fid_lite0_features"] for row, numbers in rows.items()}
        value, floor = fid.get("generations"), fid.get("reconstructed_held_out")
        counts = f"{rows['generations']['num_other']} generations, " if rows else ""
        of = f"{counts}floor: the held-out photographs' reconstructions"
        ratio = None if value is None or floor is None else value / floor
        found.append(
            Figure(f"FID (Lite0 features) to {name} photographs, of the floor", ratio, of, stretch=1.5, least_is_best=True)
        )  # fmt: skip
        if to == "to_held_out":
            fair = fid.get("reconstructed_training_images")
            ratio = None if value is None or fair is None else value / fair
            of = f"{counts}floor: as many training photographs' reconstructions"
            found.append(Figure("... of the floor of other photographs", ratio, of))
    nearest = generations.get("nearest", {})
    distances = nearest.get("distances", [])
    copies = nearest.get("as_near_as_copies")
    return [*found, Figure("as near to a training photograph as a copy of it", copies, f"{len(distances)} generations")]


def _table(document: Report) -> str:
    rows = [
        [
            figure["what"],
            *(_number(figure[name]) for name in ("value", "random", "real", "bar", "stretch")),
            figure["reached"],
            figure["of"],
        ]
        for figure in document["figures"]
    ]
    seconds = document["whole_captions"]["seconds"]["total"] + document["partial_captions"]["seconds"]["total"]
    title = f"{document['model']}, seed {document['config']['seed']}, {seconds_text(seconds)}"
    return table(title, ["what", "value", "random", "real", "bar", "stretch", "reached", "of"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
