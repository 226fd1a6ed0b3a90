"""`kodalle evaluate`: a model folder's quality on held-out pairs.

Every part of the folder is measured, on the validation split:

    reconstruction  vqgan         reconstruction error, use of the codebook                  all pairs
    likelihood      transformer   loss of text and image tokens, top-1 accuracy of these     all pairs
    retrieval       koclip        loss, recall@1/5 of the right caption among 100            all pairs
    generations     all           generations of held-out captions: KoCLIP and CLIP score,   `generations` captions
                                  colours, caption classes                                   x `candidates`
    distances       vqgan         FID of reconstructions                                     `distance_images` photographs
                    all           FID, KID, precision and recall, Inception Score of         `distance_images` generations
                                  generations; their nearest training photographs
    best-of-n       all           what ranking 1, 2, 4, ... `best_of` candidates is worth    `best_of_captions` captions

Equal arguments give equal reports on one machine; only `seconds` differs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pairs, load_pairs
from engine.data.partial_captions import with_partial_held_out
from engine.device import fit_to_machine, pick_device
from engine.errors import InputError
from engine.facts import facts
from engine.files import check_file_place, write_json
from engine.metrics.agreement import ImageReader, classifier_trust, colour_names
from engine.metrics.clip_score import ClipScorer
from engine.metrics.distance_generations import DistanceGenerations, distance_report
from engine.metrics.distances import PhotographFeatures, photograph_features, reconstruction_distances
from engine.metrics.features import FeatureEncoder
from engine.metrics.fid import LEAST_FOR_KID
from engine.metrics.generations import GenerationCounts, score_generations
from engine.metrics.independent_classifier import load_classifier
from engine.metrics.likelihood import likelihood
from engine.metrics.lite0_features import Lite0Encoder, Lite0HeadEncoder
from engine.metrics.oracle import Oracle
from engine.metrics.parts import PARTS, EvaluationRun, OnPhaseProgress, Parts, load_parts
from engine.metrics.readings import CandidateReader
from engine.metrics.reconstruction import reconstruction_error
from engine.metrics.retrieval import retrieval
from engine.models.folder_config import has_part, weights_digest
from engine.pipeline.pipeline import Pipeline
from engine.progress import PhaseBars, seconds_text

MetricName = Literal["reconstruction", "likelihood", "retrieval", "generations", "distances", "best-of-n"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
_TABLE_SECTIONS = ("pairs", "reconstruction", "kodalle", "koclip", "independent_classifier", "generations")


def evaluate(
    model_folder: Path,
    pairs_folder: Path,
    *,
    metrics: Sequence[MetricName] | None = None,
    generations: int = 40,
    candidates: int = 16,
    seed: int = 7,
    batch_size: int = 16,
    device: str = "",
    independent_classifier: Path | None = None,
    partial_captions: bool = False,
    distance_images: int = 0,
    feature_encoder: FeatureEncoder | None = None,
    clip: ClipScorer | None = None,
    best_of: int = 0,
    best_of_captions: int = 12,
    oracle: Oracle | None = None,
    sheets: Path | None = None,
    on_progress: OnPhaseProgress | None = None,
) -> dict[str, Any]:
    """Measures every part of a model folder on the validation split.

    Args:
        metrics: what is measured; None: everything that the options below ask for and the folder has.
        generations: number of held-out captions to generate images for, if the folder has a transformer; all distinct ones
            when there are fewer.
        candidates: images for each caption.
        seed: of the generations and of every choice of pairs.
        batch_size: images at once.
        device: as `pick_device`; "": CUDA where there is one.
        independent_classifier: folder of `kodalle train-classifier`. Left out of what generations are measured by when
            it names fewer than LEAST_ACCURACY of the held-out photographs rightly.
        partial_captions: use captions with sentences left out, as people write them.
        distance_images: generations of whole captions for distances between sets; 0: none.
        feature_encoder: of the network that distances are measured in, on `device`; None: EfficientNet-Lite0.
        clip: scores generations, too; on `device`.
        best_of: candidates for the curves of best-of-N; 0: none.
        best_of_captions: captions that they are averaged over.
        oracle: reads from pixels whether a generation is right.
        sheets: where PNGs of top-ranked images go, see engine.metrics.sheets.
        on_progress: called with (phase, done, total).

    Returns:
        The report, ready for JSON; each key is described by the function that makes it.

    Raises:
        InputError: no validation split, a model without parts, a part that cannot be read, options out of range or that
            exclude each other, an independent classifier of other classes.
    """
    requested = _requested(metrics, generations=generations, distance_images=distance_images, best_of=best_of)
    counts = GenerationCounts(
        captions=generations if "generations" in requested else 0, candidates=candidates,
        best_of=best_of if "best-of-n" in requested else 0, best_of_captions=best_of_captions,
    )  # fmt: skip
    _check_numbers(counts, seed=seed, distance_images=distance_images)
    if clip is not None and not requested & {"generations", "best-of-n"}:
        raise InputError("--clip", clip.name, "scores generations: leave them in --metrics, and above 0")
    if partial_captions and "distances" in requested:
        raise InputError("--distance-images", distance_images, "is for whole captions: leave --partial-captions out")
    started = time.perf_counter()
    pairs = load_pairs(pairs_folder)
    if not pairs.validation:
        raise InputError("pairs", pairs_folder, _without_held_out(pairs, pairs_folder))
    fit_to_machine()
    parts = load_parts(model_folder, pick_device(device))
    if parts.pipeline is not None and parts.koclip is None and counts.best_of:
        raise InputError("--best-of", best_of, "needs a ranker, and the model folder has no koclip: leave it out")
    classes = None if independent_classifier is None else find_caption_classes(pairs)
    classifier = None
    if independent_classifier is not None:
        if classes is None:
            remedy = "has nothing to tell apart: these pairs' training captions state fewer than two classes"
            raise InputError("--independent-classifier", independent_classifier, remedy)
        classifier = load_classifier(independent_classifier).for_classes(classes, folder=independent_classifier)
    encoder = Lite0Encoder(parts.device) if classifier is not None else None
    run = EvaluationRun(parts.device, seed, batch_size, on_progress or (lambda *_: None))
    report: dict[str, Any] = _describe(model_folder, parts, pairs_folder, pairs)
    timer = _Timer(report, {"loading": time.perf_counter() - started})

    held, vqgan, koclip = pairs.validation, parts.vqgan, parts.koclip
    pipeline, tokenizer = parts.pipeline, parts.tokenizer
    if vqgan is not None and "reconstruction" in requested:
        batches = run.images(held, vqgan.config.image_size, "reconstruction")
        timer.phase("reconstruction", lambda: reconstruction_error(vqgan, batches))
    distances = None
    if vqgan is not None and "distances" in requested:
        feature_encoder = feature_encoder or Lite0HeadEncoder(parts.device)
        distances = _Distances(run, parts, pairs, feature_encoder, distance_images)
        timer.phase("reconstruction", distances.of_reconstructions)
    if pipeline is not None and "likelihood" in requested:
        timer.phase("kodalle", lambda: likelihood(run, pipeline, held))
    if koclip is not None and tokenizer is not None and "retrieval" in requested:
        timer.phase("koclip", lambda: retrieval(run, koclip, tokenizer, held))
    if pipeline is not None and requested & {"generations", "distances", "best-of-n"}:
        if classifier is not None and classes is not None and encoder is not None:
            size = pipeline.vqgan.config.image_size
            timer.phase(
                "independent_classifier", lambda: classifier_trust(run, encoder, classifier, classes, held, size)
            )
        usable = report.get("independent_classifier", {}).get("usable", False)
        colours = colour_names(pairs, pipeline.vqgan.config.image_size)
        images = ImageReader(colours, classifier if usable else None, classes)
        reader = CandidateReader(run, images, encoder if usable else None, oracle, clip)
        held_out = with_partial_held_out(pairs, seed) if partial_captions else pairs
        timer.phase(
            "generations",
            lambda: (
                {"partial_captions": partial_captions}
                | _generations(run, pipeline, held_out, reader, counts, distances, sheets)
            ),
        )
    if clip is not None and "clip_score" in report.get("generations", {}):
        report["generations"]["clip_score"]["also_ranked"] = clip.weights == report["model"].get("koclip")
    seconds = timer.seconds | {"total": time.perf_counter() - started}
    return report | {"seconds": {name: round(value, 2) for name, value in seconds.items()}}


@dataclass(frozen=True)
class _Timer:
    """Sections of a report and the seconds that each took; a section may be made in several phases."""

    report: dict[str, Any]
    seconds: dict[str, float]

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        started = time.perf_counter()
        self.report[name] = self.report.get(name, {}) | work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass
class _Distances:
    """Distances between sets: first of what the codec reconstructs, then of what the transformer generates."""

    run: EvaluationRun
    parts: Parts
    pairs: Pairs
    encoder: FeatureEncoder
    num_images: int
    photographs: PhotographFeatures | None = None

    def of_reconstructions(self) -> dict[str, Any]:
        """features: the network; distances: see `reconstruction_distances`, or `left_out` says why not."""
        vqgan, pipeline, network = self.parts.vqgan, self.parts.pipeline, self.encoder.network
        assert vqgan is not None
        found = {"features": {"name": network.name, "title": network.title, "weights": network.weights}}
        if self.left_out:
            return found | {"distances": {"left_out": self.left_out}}
        decode = vqgan.decode if pipeline is None else pipeline.decode_images
        self.photographs = photograph_features(
            self.run, vqgan, decode, self.encoder, self.pairs, num_reconstructed=self.num_images
        )
        return found | {"distances": reconstruction_distances(self.photographs, seed=self.run.seed)}

    @property
    def left_out(self) -> str:
        """Why there are none; empty where there are enough images."""
        held, train = len(self.pairs.validation), len(self.pairs.train)
        if min(self.num_images, held, train) >= LEAST_FOR_KID:
            return ""
        shown = f"{self.num_images} generations, {held} held-out, {train} training photographs"
        return f"{shown}: {LEAST_FOR_KID} of each are needed"

    def generations(self) -> DistanceGenerations | None:
        """An empty set; None where there are too few images."""
        if self.photographs is None:
            return None
        return DistanceGenerations.of(self.run, self.encoder, self.pairs.validation, self.num_images)


def _generations(
    run: EvaluationRun,
    pipeline: Pipeline,
    held_out: Pairs,
    reader: CandidateReader,
    counts: GenerationCounts,
    distances: _Distances | None,
    sheets: Path | None,
) -> dict[str, Any]:
    kept = distances.generations() if distances is not None else None
    found = score_generations(run, pipeline, held_out, reader, counts, distances=kept, sheets=sheets)
    if distances is None:
        return found.report
    if kept is None or distances.photographs is None:
        return found.report | {"distances": {"left_out": distances.left_out}}
    return found.report | distance_report(
        kept, pipeline, distances.pairs, distances.photographs, shown=found.shown, sheets=sheets
    )


def _check_numbers(counts: GenerationCounts, *, seed: int, distance_images: int) -> None:
    for option, value, least in (
        ("--generations", counts.captions, 0),
        ("--candidates", counts.candidates, 1),
        ("--seed", seed, 0),
        ("--distance-images", distance_images, 0),
        ("--best-of", counts.best_of, 0),
        ("--best-of-captions", counts.best_of_captions, 1),
    ):
        if value < least:
            raise InputError(option, value, f"give {least} or more")


def _requested(
    metrics: Sequence[MetricName] | None, *, generations: int, distance_images: int, best_of: int
) -> set[MetricName]:
    """What is to be measured.

    Raises:
        InputError: a metric that is none, or one without the number of its images.
    """
    numbers: dict[MetricName, tuple[str, int]] = {
        "generations": ("--generations", generations), "distances": ("--distance-images", distance_images),
        "best-of-n": ("--best-of", best_of),
    }  # fmt: skip
    if metrics is None:
        return {name for name in METRICS if name not in numbers or numbers[name][1]}
    for name in metrics:
        if name not in METRICS:
            raise InputError("--metrics", name, f"is none: give some of {', '.join(METRICS)}, with commas between")
        option, number = numbers.get(name, ("", 1))
        if not number:
            raise InputError("--metrics", name, f"needs {option}: the number of its images")
    for name, (option, number) in numbers.items():
        if number and name not in metrics and name != "generations":  # which has a default
            raise InputError(option, number, f"is for {name}: add it to --metrics")
    return set(metrics)


def _without_held_out(pairs: Pairs, folder: Path) -> str:
    few = f"none of its {len(pairs)} pairs is held out"
    if (folder / "pairs.jsonl").is_file():
        return f"{few}: prepare it again with a larger --validation-fraction, or another --seed"
    return f"{few}, which chance decides: put some into validation/ and the others into train/"


def evaluate_to_file(
    model: Path,
    pairs: Path,
    out: Path,
    *,
    metrics: Sequence[MetricName] | None = None,
    generations: int = 40,
    candidates: int = 16,
    seed: int = 7,
    device: str = "",
    independent_classifier: Path | None = None,
    partial_captions: bool = False,
    distance_images: int = 0,
    feature_encoder: FeatureEncoder | None = None,
    clip: ClipScorer | None = None,
    best_of: int = 0,
    best_of_captions: int = 12,
    oracle: Oracle | None = None,
) -> dict[str, Any]:
    """`evaluate` with progress bars; writes `out` (JSON), the sheets beside it (.png), and prints a table.

    The file names the machine, the versions and the commit, too.

    Raises:
        InputError: from `evaluate`, or an `out` that cannot be a JSON file; nothing is written then.
    """
    check_file_place(out, field="--out", beside=".png")
    machine = facts(pick_device(device))  # before anything is written or computed: the commit, the load
    with PhaseBars() as bars:
        report = evaluate(
            model, pairs, metrics=metrics, generations=generations, candidates=candidates, seed=seed, device=device,
            independent_classifier=independent_classifier, partial_captions=partial_captions,
            distance_images=distance_images, feature_encoder=feature_encoder, clip=clip, best_of=best_of,
            best_of_captions=best_of_captions, oracle=oracle, sheets=out.with_suffix(".png"), on_progress=bars.update,
        )  # fmt: skip
    report = machine | report
    write_json(out, report)
    print(table(report))
    print(f"{seconds_text(report['seconds']['total'])} in all; see {out}")
    return report


# -------------------------------------------------------------------------------------------------------- description


def _describe(folder: Path, parts: Parts, pairs_folder: Path, pairs: Pairs) -> dict[str, Any]:
    described: dict[str, Any] = {name: weights_digest(folder, name) for name in PARTS if has_part(folder, name)}
    if parts.tokenizer is not None:
        described["tokenizer"] = parts.tokenizer.digest
    return {
        "model_name": folder.resolve().name,
        "model": described,
        "pairs": {
            "validation": len(pairs.validation),
            "validation_captions": len({pair.captions[0] for pair in pairs.validation}),
            "train": len(pairs.train),
            "set_aside": len(pairs.set_aside),
            # A plain folder is split here as training splits it by default: another seed there would mix the sides.
            "split": "prepared" if (pairs_folder / "pairs.jsonl").is_file() else "plain folder, default seed",
        },
        "torch": torch.__version__,
        "device": parts.device.type,
    }


# --------------------------------------------------------------------------------------------------------- reporting


def table(report: Mapping[str, Any]) -> str:
    """The report's numbers, one a line under the names of their sections; lists stay in the JSON."""
    rows: list[tuple[str, str]] = []

    def walk(section: Mapping[str, Any], depth: int) -> None:
        for key, value in section.items():
            name = "  " * depth + key.replace("_", " ")
            if isinstance(value, Mapping):
                rows.append((name, ""))
                walk(value, depth + 1)
            elif not isinstance(value, list):
                rows.append((name, _shown(value)))

    walk({name: report[name] for name in _TABLE_SECTIONS if name in report}, 0)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
