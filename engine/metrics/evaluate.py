"""`kodalle evaluate`: a model folder's quality on held-out pairs.

Every part of the folder is measured, on the validation split:

    vqgan         reconstruction error, use of the codebook                        all pairs
    transformer   loss of text and image tokens, top-1 accuracy of image tokens    all pairs
    koclip        loss, recall@1/5 of the right caption among 100                  all pairs
    all           generations of held-out captions: KoCLIP score, colours,         `generations` captions x `candidates`
                  caption classes
                  their FID, KID, nearest training photographs                     `distance_images` generations

Equal arguments give equal reports on one machine; only `seconds` differs.

B images, T text positions, E embedding width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.caption_classes import CaptionClasses, find_caption_classes
from engine.data.pairs import Pair, Pairs, load_pairs
from engine.data.partial_captions import with_partial_held_out
from engine.data.tokenizer import CaptionTokenizer
from engine.device import fit_to_machine, pick_device
from engine.errors import InputError
from engine.facts import facts
from engine.files import check_file_place, write_json
from engine.metrics.agreement import ImageReader, colour_names
from engine.metrics.generations import score_generations
from engine.metrics.independent_classifier import LEAST_ACCURACY, IndependentClassifier, agreement, load_classifier
from engine.metrics.lite0_features import Lite0Encoder
from engine.metrics.oracle import Oracle
from engine.metrics.parts import PARTS, EvaluationRun, OnPhaseProgress, Parts, load_parts
from engine.metrics.reconstruction import reconstruction_error
from engine.metrics.retrieval import num_distinct, recall_at
from engine.models.folder import has_part, weights_digest
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.pipeline.pipeline import Pipeline
from engine.progress import PhaseBars, seconds_text

RECALL_AMONG = 100
RECALL_RANKS = (1, 5)
_RECALL_ROUNDS = 20  # of 100 captions, when there are more: the standard error of one is up to 5 points
_TABLE_SECTIONS = ("pairs", "reconstruction", "kodalle", "koclip", "independent_classifier", "generations")
_LOSS_BATCH = 64  # KoCLIP's loss depends on how many captions compete


def evaluate(
    model_folder: Path,
    pairs_folder: Path,
    *,
    generations: int = 40,
    candidates: int = 16,
    seed: int = 7,
    batch_size: int = 16,
    device: str = "",
    independent_classifier: Path | None = None,
    partial_captions: bool = False,
    distance_images: int = 0,
    oracle: Oracle | None = None,
    sheets: Path | None = None,
    on_progress: OnPhaseProgress | None = None,
) -> dict[str, Any]:
    """Measures every part of a model folder on the validation split.

    Args:
        generations: number of held-out captions to generate images for, if the folder has a transformer; all distinct ones
            when there are fewer.
        candidates: images for each caption.
        seed: of the generations and of every choice of pairs.
        batch_size: images at once.
        device: as `pick_device`; "": CUDA where there is one.
        independent_classifier: folder of `kodalle train-classifier`. Left out of what generations are measured by when
            it names fewer than LEAST_ACCURACY of the held-out photographs rightly.
        partial_captions: use captions with sentences left out, as people write them.
        distance_images: generations of whole captions for FID, KID and nearest training photographs; 0: none.
        oracle: reads from pixels whether a generation is right.
        sheets: where PNGs of top-ranked images go, see engine.metrics.sheets.
        on_progress: called with (phase, done, total).

    Returns:
        The report, ready for JSON; each key is described by the function that makes it.

    Raises:
        InputError: no validation split, a model without parts, a part that cannot be read, options out of range or that
            exclude each other, an independent classifier of other classes.
    """
    for option, value, least in (
        ("--generations", generations, 0),
        ("--candidates", candidates, 1),
        ("--seed", seed, 0),
        ("--distance-images", distance_images, 0),
    ):
        if value < least:
            raise InputError(option, value, f"give {least} or more")
    if distance_images and not generations:
        raise InputError(
            "--distance-images", distance_images, "are some of the generations: leave --generations above 0"
        )
    if partial_captions and distance_images:
        raise InputError("--distance-images", distance_images, "is for whole captions: leave --partial-captions out")
    started = time.perf_counter()
    pairs = load_pairs(pairs_folder)
    if not pairs.validation:
        raise InputError("pairs", pairs_folder, _without_held_out(pairs, pairs_folder))
    fit_to_machine()
    parts = load_parts(model_folder, pick_device(device))
    classes = None if independent_classifier is None else find_caption_classes(pairs)
    classifier = None
    if independent_classifier is not None:
        if classes is None:
            remedy = "has nothing to tell apart: these pairs' training captions state fewer than two classes"
            raise InputError("--independent-classifier", independent_classifier, remedy)
        classifier = load_classifier(independent_classifier).for_classes(classes, folder=independent_classifier)
    encoder = Lite0Encoder(parts.device) if classifier is not None or distance_images else None
    run = EvaluationRun(parts.device, seed, batch_size, on_progress or (lambda *_: None))
    report: dict[str, Any] = _describe(model_folder, parts, pairs_folder, pairs)
    seconds = {"loading": time.perf_counter() - started}

    def phase(name: str, work: Callable[[], dict[str, Any]]) -> None:
        phase_started = time.perf_counter()
        report[name] = work()
        seconds[name] = time.perf_counter() - phase_started

    held, vqgan, koclip = pairs.validation, parts.vqgan, parts.koclip
    pipeline, tokenizer = parts.pipeline, parts.tokenizer
    if vqgan is not None:
        phase("reconstruction", lambda: _reconstruction(run, vqgan, held))
    if pipeline is not None:
        phase("kodalle", lambda: _likelihood(run, pipeline, held))
    if koclip is not None and tokenizer is not None:
        phase("koclip", lambda: _retrieval(run, koclip, tokenizer, held))
    if pipeline is not None and generations:
        if classifier is not None and classes is not None and encoder is not None:
            size = pipeline.vqgan.config.image_size
            phase("independent_classifier", lambda: _trust(run, encoder, classifier, classes, held, size))
        usable = report.get("independent_classifier", {}).get("usable", False)
        held_out = with_partial_held_out(pairs, seed) if partial_captions else pairs
        colours = colour_names(pairs, pipeline.vqgan.config.image_size)
        reader = ImageReader(colours, classifier if usable else None, classes)
        phase("generations", lambda: {"partial_captions": partial_captions} | score_generations(
            run, pipeline, held_out, reader, encoder,
            count=generations, candidates=candidates, distance_images=distance_images, oracle=oracle, sheets=sheets,
        ))  # fmt: skip
    seconds["total"] = time.perf_counter() - started
    report["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    return report


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
    generations: int = 40,
    candidates: int = 16,
    seed: int = 7,
    device: str = "",
    independent_classifier: Path | None = None,
    partial_captions: bool = False,
    distance_images: int = 0,
    oracle: Oracle | None = None,
) -> dict[str, Any]:
    """`evaluate` with progress bars; writes `out` (JSON), the sheets beside it (.png), and prints a table.

    The file names the machine, the versions and the commit, too.

    Raises:
        InputError: from `evaluate`, or an `out` that cannot be a JSON file; nothing is written then.
    """
    if out.suffix.lower() == ".png":
        raise InputError("--out", out, "is not a place for a JSON file: give a file name such as evaluation.json")
    check_file_place(out, field="--out")
    machine = facts(pick_device(device))  # before anything is written or computed: the commit, the load
    with PhaseBars() as bars:
        report = evaluate(
            model, pairs, generations=generations, candidates=candidates, seed=seed, device=device,
            independent_classifier=independent_classifier, partial_captions=partial_captions,
            distance_images=distance_images, oracle=oracle, sheets=out.with_suffix(".png"), on_progress=bars.update,
        )  # fmt: skip
    write_json(out, machine | report)
    print(table(report))
    print(f"{seconds_text(report['seconds']['total'])} in all; see {out}")
    return report


# -------------------------------------------------------------------------------------------------------- description


def _describe(folder: Path, parts: Parts, pairs_folder: Path, pairs: Pairs) -> dict[str, Any]:
    described: dict[str, Any] = {name: weights_digest(folder, name) for name in PARTS if has_part(folder, name)}
    if parts.tokenizer is not None:
        described["tokenizer"] = parts.tokenizer.digest
    return {
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


# ------------------------------------------------------------------------------------------------- parts on all pairs


def _reconstruction(run: EvaluationRun, vqgan: ImageCodec, held: Sequence[Pair]) -> dict[str, Any]:
    return reconstruction_error(vqgan, run.images(held, vqgan.config.image_size, "reconstruction"))


def _trust(
    run: EvaluationRun,
    encoder: Lite0Encoder,
    classifier: IndependentClassifier,
    classes: CaptionClasses,
    held: Sequence[Pair],
    image_size: int,
) -> dict[str, Any]:
    """How often the classifier is right about held-out photographs at the model's size; `left_out` says when its word is
    worth nothing."""
    known = [(pair, number) for pair in held if (number := classes.of(pair)) is not None]
    if not known:
        return {"images": 0, "usable": False, "left_out": "no held-out photograph has a class of the training captions"}
    images = run.images([pair for pair, _ in known], image_size, "independent classifier")
    found = agreement(classifier.classify(encoder.encode(images)), [number for _, number in known])
    if not found["usable"]:
        found["left_out"] = f"fewer than {LEAST_ACCURACY:.0%} of held-out photographs named rightly: worth nothing"
    return found


@torch.no_grad()
def _likelihood(run: EvaluationRun, pipeline: Pipeline, held: Sequence[Pair]) -> dict[str, Any]:
    """Of each pair's first caption: loss_text and loss_image in nats a token, image_top1 as a share."""
    transformer, vqgan = pipeline.transformer, pipeline.vqgan
    captions = [pair.captions[0] for pair in held]
    text = pipeline.tokenizer.encode(captions, transformer.config.text_seq_len)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    start = 0
    for images in run.images(held, vqgan.config.image_size, "kodalle"):
        text_tokens = text.tokens[start : start + len(images)].to(run.device)  # (B, T)
        found = transformer(text_tokens, vqgan.encode(images))
        means = torch.stack([found.loss_text, found.loss_image, found.image_top1]).double().cpu()
        sums += len(images) * means  # all sequences are equally long, so means of batches may be weighted
        start += len(images)
    loss_text, loss_image, image_top1 = (sums / len(held)).tolist()
    return {
        "pairs": len(held),
        "captions_cut": sum(cut > 0 for cut in text.cut),
        "loss_text": loss_text,
        "loss_image": loss_image,
        "image_top1": image_top1,
    }


@torch.no_grad()
def _retrieval(run: EvaluationRun, koclip: Ranker, tokenizer: CaptionTokenizer, held: Sequence[Pair]) -> dict[str, Any]:
    """KoCLIP's loss over batches of `loss_batch`, and recall of the right caption among `recall_among`."""
    text = tokenizer.encode([pair.captions[0] for pair in held], koclip.config.text_seq_len)
    texts = torch.cat([koclip.embed_texts(part.to(run.device)) for part in text.tokens.split(run.batch_size)])
    batches = run.images(held, koclip.config.image_size, "koclip")
    images = torch.cat([koclip.embed_images(part) for part in batches])  # (B, E)
    loss_batch = min(_LOSS_BATCH, len(held))
    order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu")
    groups = [group for group in order.split(loss_batch) if len(group) == loss_batch]
    losses = [float(koclip.loss(images[group], texts[group])) for group in groups]
    return {
        "pairs": len(held),
        "captions_cut": sum(cut > 0 for cut in text.cut),
        "loss": sum(losses) / len(losses),
        "loss_batch": loss_batch,
    } | mean_recall(koclip, images.cpu(), texts.cpu(), text.tokens, run.generator())


def mean_recall(
    koclip: Ranker, images: Tensor, texts: Tensor, tokens: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """Mean recall over rounds; each takes (up to) 100 distinct captions and one image of each, at random.

    Args:
        images: (B, E).
        texts: (B, E).
        tokens: (B, T), which captions are distinct.

    Returns:
        recall_at_1, recall_at_5; recall_among: captions in a round; recall_rounds.
    """
    distinct = num_distinct(tokens)
    among = min(RECALL_AMONG, distinct)
    rounds = (
        1 if distinct == len(tokens) <= RECALL_AMONG else _RECALL_ROUNDS
    )  # without a choice all rounds are the same
    sums = dict.fromkeys(RECALL_RANKS, 0.0)
    for _ in range(rounds):
        order = torch.randperm(len(tokens), generator=generator, dtype=torch.int64, device="cpu")
        # recall_at takes the first `among` distinct captions, so only those rows are scored.
        _, label = torch.unique(tokens[order], dim=0, return_inverse=True)
        first: dict[int, int] = {}
        for row, value in zip(order.tolist(), label.tolist(), strict=True):
            first.setdefault(value, row)
        rows = torch.tensor(list(first.values())[:among], dtype=torch.int64, device="cpu")
        scores = koclip.scores(images[rows], texts[rows]).T  # image i against caption j
        for rank, share in recall_at(scores, tokens[rows], among=among, ranks=RECALL_RANKS).items():
            sums[rank] += share / rounds
    return {f"recall_at_{rank}": share for rank, share in sums.items()} | {
        "recall_among": among,
        "recall_rounds": rounds,
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
