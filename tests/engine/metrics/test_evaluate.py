"""A tiny model of every part, evaluated: numbers against plain computations, parts that are missing, faults."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from engine.cli import app
from engine.data.pairs import load_image, load_pairs
from engine.errors import InputError
from engine.interop.clip_scorer import open_clip_scorer
from engine.metrics.distance_generations import DistanceGenerations
from engine.metrics.evaluate import evaluate, evaluate_to_file, table
from engine.metrics.features import ImageFeatures
from engine.metrics.parts import EvaluationRun
from engine.metrics.retrieval import mean_recall
from engine.models.folder import load_folder_tokenizer, load_part
from engine.models.folder_config import weights_digest
from engine.models.koclip import KoClip
from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.pipeline import Pipeline
from tests.engine.metrics.evaluation_pairs import write_pairs
from tests.engine.metrics.feature_sets import NETWORK, of
from tests.engine.metrics.test_inception_features import encoder as inception_encoder


@pytest.fixture(scope="module")
def evaluated(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out") / "evaluation.json"
    evaluate_to_file(model, pairs, out, generations=12, candidates=5, seed=3)
    return json.loads(out.read_text(encoding="utf-8")), out


def test_the_report_states_what_was_measured(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, _ = evaluated
    assert set(report["model"]) == {"vqgan", "transformer", "koclip", "tokenizer"}
    assert report["pairs"] == {
        "validation": 16, "validation_captions": 12, "train": 16, "set_aside": 0, "split": "prepared",
    }  # fmt: skip
    assert report["torch"] == torch.__version__
    assert report["reconstruction"]["images"] == report["kodalle"]["pairs"] == report["koclip"]["pairs"] == 16
    generations = report["generations"]
    assert (generations["captions"], generations["candidates"], generations["seed"]) == (12, 5, 3)
    assert {one["seed"] for one in generations["top_ranked"]} == {3}
    assert len({one["caption"] for one in generations["top_ranked"]}) == 12
    assert set(report["seconds"]) == {"loading", "reconstruction", "kodalle", "koclip", "generations", "total"}
    lines = table(report).splitlines()
    assert "koclip" in lines
    assert f"  pairs{16:>{lines[1].index('16') - 5}}" in lines  # indented under its section, values in one column


def test_losses_equal_those_of_one_batch(evaluated: tuple[dict[str, Any], Path], model: Path, pairs: Path) -> None:
    held = load_pairs(pairs).validation
    images = torch.from_numpy(np.stack([load_image(pair, 32) for pair in held])).permute(0, 3, 1, 2).float() / 255
    text = load_folder_tokenizer(model).encode([pair.captions[0] for pair in held], 8).tokens
    with torch.no_grad():
        found = load_part(model, "transformer")(text, load_part(model, "vqgan").encode(images))
        clip_loss = load_part(model, "koclip")(images, text)
    report = evaluated[0]
    assert report["kodalle"]["loss_text"] == pytest.approx(float(found.loss_text), rel=1e-5)
    assert report["kodalle"]["loss_image"] == pytest.approx(float(found.loss_image), rel=1e-5)
    assert report["kodalle"]["image_top1"] == pytest.approx(float(found.image_top1), abs=1e-6)
    assert report["koclip"]["loss_batch"] == 16
    assert report["koclip"]["loss"] == pytest.approx(float(clip_loss), rel=1e-4)
    assert report["koclip"]["recall_among"] == 12


def test_scores_and_colours_have_their_bounds(evaluated: tuple[dict[str, Any], Path]) -> None:
    generations = evaluated[0]["generations"]
    assert generations["koclip_score"]["top_ranked"] >= generations["koclip_score"]["random"]
    tops = [one["score"] for one in generations["top_ranked"]]
    assert generations["koclip_score"]["top_ranked"] == pytest.approx(sum(tops) / 12)
    colour = generations["colour_agreement"]
    assert (colour["real"], colour["num_real"], colour["names"], colour["num_captions"]) == (1.0, 16, 4, 12)
    assert colour["commonest"] == 0.25
    assert not {"distances", "nearest", "class_agreement"} & set(generations)


def test_the_sheets_show_every_caption_once(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, out = evaluated
    assert report["generations"]["sheets"] == {
        "plain": "evaluation.png", "captioned": "evaluation-captioned.png", "large": "evaluation-large.png",
        "reconstructions": "evaluation-reconstructions.png",
    }  # fmt: skip
    sizes = {}
    for name, file in report["generations"]["sheets"].items():
        with Image.open(out.parent / file) as sheet:
            sizes[name] = sheet.size
    assert sizes["plain"] == (10 * 36 + 4, 2 * 36 + 4)
    assert sizes["reconstructions"] == (10 * 36 + 4, 2 * 68 + 4)
    assert sizes["captioned"][0] == 4 + 8 * 164
    assert sizes["large"][0] == 4 + 4 * 72
    for name in ("plain", "captioned"):
        metadata = read_metadata((out.parent / report["generations"]["sheets"][name]).read_bytes())
        assert metadata["captions"] == report["generations"]["top_ranked"]


def test_more_captions_begin_with_the_same(model: Path, pairs: Path, evaluated: tuple[dict[str, Any], Path]) -> None:
    few = evaluate(model, pairs, generations=3, candidates=5, seed=3)["generations"]["top_ranked"]
    many = evaluated[0]["generations"]["top_ranked"]
    assert [one["caption"] for one in few] == [one["caption"] for one in many[:3]]
    assert [one["candidate"] for one in few] == [one["candidate"] for one in many[:3]]


def test_equal_arguments_equal_reports(model: Path, pairs: Path) -> None:
    first, again = (evaluate(model, pairs, generations=2, candidates=2, batch_size=5) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.slow
def test_distances_and_nearest_photographs(model: Path, tmp_path: Path) -> None:
    many = write_pairs(tmp_path / "many", held_out=50, train=60)
    phases: list[tuple[str, int, int]] = []
    report = evaluate(
        model, many, generations=10, candidates=3, distance_images=60, sheets=tmp_path / "sheet.png",
        best_of=6, best_of_captions=2, on_progress=lambda *phase: phases.append(phase),
    )  # fmt: skip
    generations = report["generations"]
    to_held_out, to_training = generations["distances"]["to_held_out"], generations["distances"]["to_training"]
    assert (to_held_out["generations"]["num_real"], to_held_out["generations"]["num_other"]) == (50, 60)
    assert to_held_out["generations"]["kid_lite0_features"] > 0.0
    assert to_held_out["generations"]["fid_lite0_features"] is None  # of 50 photographs
    assert to_held_out["reconstructed_training_images"]["num_other"] == 60
    assert (to_training["generations"]["num_real"], to_training["held_out"]["num_other"]) == (60, 50)
    nearest = generations["nearest"]
    assert len(nearest["distances"]) == len(nearest["photographs"]) == 10
    trained_on = {pair.key for pair in load_pairs(many).train}
    assert set(nearest["photographs"]) <= trained_on
    assert nearest["sheet"] == "sheet-nearest.png"
    with Image.open(tmp_path / "sheet-nearest.png") as sheet:
        assert sheet.size == (4 + 5 * 72, 4 + 2 * (32 + 4 + 15 + 8))
    assert 0 <= to_held_out["generations"]["precision_lite0_features"] <= 1
    assert generations["inception_score_lite0_features"]["generations"]["images"] == 60
    assert report["reconstruction"]["distances"]["held_out"] == to_held_out["reconstructed_held_out"]
    assert report["reconstruction"]["features"]["name"] == "lite0"
    assert report["reconstruction"]["psnr_db"] > 0
    assert ("koclip", 50, 50) in phases
    assert ("generating", 10, 10) in phases
    assert ("generating for distances", 60, 60) in phases
    too_few = evaluate(model, many, metrics=["distances"], distance_images=49)
    assert "50 of each are needed" in too_few["generations"]["distances"]["left_out"]
    assert "50 of each are needed" in too_few["reconstruction"]["distances"]["left_out"]


def test_the_set_for_distances_has_captions_as_often_as_the_photographs(model: Path, pairs: Path) -> None:
    """Its images are those of the seed's candidates, whether they were ranked or not."""
    encoded: list[torch.Tensor] = []

    class Encoder:
        """Keeps the images; a feature is their mean."""

        network = NETWORK

        def encode(self, batches: Iterable[torch.Tensor]) -> ImageFeatures:
            kept = list(batches)
            encoded.extend(kept)
            return of(torch.cat(kept).mean(dim=(1, 2, 3))[:, None])

    held = load_pairs(pairs).validation
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    run = EvaluationRun(torch.device("cpu"), 3, 16, lambda *_: None)
    repeated = next(text for text, times in Counter(pair.captions[0] for pair in held).items() if times == 2)
    ranked, wanted = (pipeline([repeated], candidates=count, seed=3)[0] for count in (3, 4))
    pixels = {one.candidate: np.asarray(one.image).astype(np.float32).mean() / 255 for one in wanted.candidates}
    images = DistanceGenerations.of(run, Encoder(), held, 32)  # type: ignore[arg-type]
    assert images.needed[repeated] == 4
    images.add(ranked)  # three of them
    found = images.completed(pipeline).values
    assert (len(found), sum(map(len, encoded))) == (32, 32)  # each once
    for value in pixels.values():
        assert min(abs(found[:, 0] - value)) < 2e-3
    assert torch.allclose(found[:3, 0], torch.tensor([pixels[number] for number in range(3)]), atol=1e-5)
    more = DistanceGenerations.of(run, Encoder(), held, 32)  # type: ignore[arg-type]
    more.add(pipeline([repeated], candidates=6, seed=3)[0])  # more than it needs
    assert len(more.completed(pipeline)) == 32


def test_a_folder_is_evaluated_on_what_it_has(make_model: Callable[..., Path], pairs: Path) -> None:
    codec = evaluate(make_model("vqgan"), pairs)
    assert "reconstruction" in codec
    assert not {"kodalle", "koclip", "generations"} & set(codec)
    ranker = evaluate(make_model("koclip"), pairs)
    assert "koclip" in ranker
    assert not {"kodalle", "reconstruction", "generations"} & set(ranker)
    transformer = evaluate(make_model("vqgan", "transformer"), pairs, generations=2, candidates=2)
    assert transformer["generations"]["top_ranked"][0]["score"] is None
    assert not {"koclip_score", "distances", "class_agreement"} & set(transformer["generations"])
    assert "generations" not in evaluate(make_model("vqgan", "transformer"), pairs, generations=0)


def test_faults(make_model: Callable[..., Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is held out"):
        evaluate(make_model("vqgan"), write_pairs(tmp_path / "pairs", held_out=0))
    with pytest.raises(InputError, match="holds none of vqgan, transformer, koclip"):
        evaluate(make_model(), pairs)
    with pytest.raises(InputError, match="has no vqgan"):
        evaluate(make_model("transformer"), pairs)
    with pytest.raises(InputError, match="--candidates: 0"):
        evaluate(make_model("vqgan"), pairs, candidates=0)
    with pytest.raises(InputError, match="--out"):
        evaluate_to_file(make_model("vqgan"), pairs, tmp_path / "sheet.png")
    with pytest.raises(InputError, match="--out"):
        evaluate_to_file(make_model("vqgan"), pairs, tmp_path)


@torch.no_grad()
def test_a_ranker_of_tokens_and_directions(make_model: Callable[..., Path], pairs: Path) -> None:
    """Candidates are ranked by the scores of images for a caption, and captions are found by those for an image."""
    options = {"token_similarity": True, "direction_projections": True}
    model = make_model("vqgan", "transformer", "koclip", ranker=options)
    pipeline = Pipeline.from_pretrained(model)
    assert isinstance(pipeline.koclip, KoClip)
    held = load_pairs(pairs).validation
    captions = [pair.captions[0] for pair in held]
    images = torch.from_numpy(np.stack([load_image(pair, 32) for pair in held])).permute(0, 3, 1, 2).float() / 255
    text = pipeline.tokenizer.encode(captions, 8).tokens
    scores = pipeline.rank_scores(captions[:2], images[:6].unflatten(0, (2, 3)))
    assert scores is not None
    expected = pipeline.koclip.similarity(images[:6], text[:2])
    torch.testing.assert_close(scores, torch.stack([expected[0, :3], expected[1, 3:]]), rtol=1e-4, atol=1e-5)
    generation = pipeline(captions[:1], candidates=4, seed=1)[0]
    made = torch.stack([torch.from_numpy(np.array(one.image)) for one in generation.candidates]).permute(0, 3, 1, 2)
    found = pipeline.koclip.similarity(made.float() / 255, text[:1])[0].tolist()
    assert [one.score for one in generation.candidates] == pytest.approx(found, abs=1e-2)  # pixels were rounded
    report = evaluate(model, pairs, generations=2, candidates=2)
    embedded = pipeline.koclip.embed_images(images), pipeline.koclip.embed_texts(text)
    assert report["koclip"] == pytest.approx(
        {"pairs": 16, "captions_cut": 0, "loss": float(pipeline.koclip.loss(*embedded)), "loss_batch": 16}
        | mean_recall(pipeline.koclip, *embedded, text, torch.Generator().manual_seed(7)),
        rel=1e-4,
    )
    assert report["generations"]["koclip_score"]["top_ranked"] >= report["generations"]["koclip_score"]["random"]


def test_recall_averages_over_choices_of_a_hundred(model: Path) -> None:
    koclip: KoClip = load_part(model, "koclip")
    tokens = torch.arange(250)[:, None] % 150  # 150 captions, 100 of them with two images
    own = torch.nn.functional.normalize(torch.randn(150, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = own[tokens[:, 0]]
    generator = torch.Generator().manual_seed(0)
    perfect = mean_recall(koclip, texts, texts, tokens, generator)
    assert perfect == {
        "recall_at_1": pytest.approx(1), "recall_at_5": pytest.approx(1), "recall_among": 100, "recall_rounds": 20,
    }  # fmt: skip
    blind = mean_recall(koclip, texts.roll(50, 0), texts, tokens, generator)
    # at chance: 0.05 +- sqrt(0.05 * 0.95 / 100), the rounds share images
    assert math.isclose(blind["recall_at_5"], 0.05, abs_tol=0.08)
    few = mean_recall(koclip, texts[:9], texts[:9], tokens[:9], generator)
    assert (few["recall_among"], few["recall_rounds"]) == (9, 1)


def test_command(model: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "here" / "evaluation.json"
    done = CliRunner().invoke(
        app, ["evaluate", str(model), str(pairs), "--out", str(out), "--generations", "3", "--candidates", "2"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["generations"]["colour_agreement"]["real"] == 1.0
    assert out.with_suffix(".png").is_file()
    assert "  psnr db" in done.output
    text = (out.parent / "evaluation-report.md").read_text(encoding="utf-8")
    assert "| PSNR, dB |" in text
    assert f"report: {out.parent / 'evaluation-report.html'}" in done.output


def test_stored_reports_name_machine_versions_and_commit(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, _ = evaluated
    assert report["hardware"]["device"] == "cpu"
    assert report["hardware"]["cpu"]
    assert report["hardware"]["cpu_isa"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["commit"]


@pytest.mark.slow
def test_best_of_n_shares_the_images_that_are_scored(model: Path, pairs: Path, tmp_path: Path) -> None:
    plain = evaluate(model, pairs, metrics=["generations"], generations=3, candidates=2)["generations"]
    sheet = tmp_path / "sheet.png"
    both = evaluate(
        model, pairs, metrics=["generations", "best-of-n"], generations=3, candidates=2, best_of=6, best_of_captions=2,
        sheets=sheet,
    )  # fmt: skip
    assert not {"kodalle", "koclip", "reconstruction"} & set(both)
    curves = both["generations"].pop("best_of_n")
    assert both["generations"].pop("sheets")
    # Of the first two candidates, as before; how many are scored at once shows in a score's last bit on some processors.
    assert both["generations"]["top_ranked"] == [
        row | {"score": pytest.approx(row["score"], abs=1e-6)} for row in plain["top_ranked"]
    ]
    assert both["generations"]["koclip_score"] == {
        name: pytest.approx(value, abs=1e-6) for name, value in plain["koclip_score"].items()
    }
    assert both["generations"]["colour_agreement"] == plain["colour_agreement"]
    assert curves["numbers"] == [1, 2, 4, 6]
    scores = curves["measures"]["ranker_score"]
    assert scores["top_ranked"] == sorted(scores["top_ranked"]) == scores["best"]
    assert scores["captions"] == 2
    assert curves["measures"]["colour_agreement"]["real"] == 1.0
    with Image.open(tmp_path / curves["sheet"]) as image:
        assert image.size[0] == 4 + 5 * (72 + 8)  # best of 1, 2, 4, 6, and the photograph
    alone = evaluate(model, pairs, metrics=["best-of-n"], best_of=6, best_of_captions=2)["generations"]
    assert alone["best_of_n"]["measures"] == curves["measures"]
    assert set(alone) == {"partial_captions", "best_of_n"}


def test_metrics_are_chosen_by_name(model: Path, pairs: Path, make_model: Callable[..., Path]) -> None:
    found = evaluate(model, pairs, metrics=["likelihood"])
    assert "kodalle" in found
    assert not {"reconstruction", "koclip", "generations"} & set(found)
    for options, message in (
        ({"metrics": ["fid"]}, "--metrics: fid: is none: give some of reconstruction, likelihood"),
        ({"metrics": ["distances"]}, "--metrics: distances: needs --distance-images"),
        ({"metrics": ["likelihood"], "best_of": 4}, "--best-of: 4: is for best-of-n: add it to --metrics"),
        ({"best_of": 4, "best_of_captions": 0}, "--best-of-captions: 0: give 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, pairs, **options)
    with pytest.raises(InputError, match="--best-of: 4: needs a ranker"):
        evaluate(make_model("vqgan", "transformer"), pairs, best_of=4)


def test_a_clip_scores_the_images_that_the_ranker_chose(model: Path, pairs: Path) -> None:
    """With the model's own ranker as the CLIP, its scores are known."""
    clip = open_clip_scorer(model, torch.device("cpu"))
    generations = evaluate(
        model, pairs, metrics=["generations", "best-of-n"], generations=4, candidates=3, best_of=4, best_of_captions=2,
        clip=clip,
    )["generations"]  # fmt: skip
    found = generations["clip_score"]
    tops = [100 * max(one["score"], 0) for one in generations["top_ranked"]]
    assert found["top_ranked"] == pytest.approx(sum(tops) / 4, abs=1e-3)
    assert (found["name"], found["captions"], found["also_ranked"]) == (model.name, "as written", True)
    assert found["weights"] == weights_digest(model, "koclip")
    assert found["real"] is not None
    curves = generations["best_of_n"]["measures"]
    assert curves["clip_score"]["top_ranked"] == pytest.approx(curves["clip_score"]["best"], rel=1e-4)
    with pytest.raises(InputError, match=r"--clip: .*: scores generations"):
        evaluate(model, pairs, metrics=["likelihood"], clip=clip)


def test_a_codec_alone_has_distances_in_the_network_that_was_given(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    many = write_pairs(tmp_path / "many", held_out=50, train=60)
    network = inception_encoder(is_published=True)
    found = evaluate(
        make_model("vqgan"), many, metrics=["distances"], distance_images=55, feature_encoder=network
    )  # fmt: skip
    assert "generations" not in found
    reconstruction = found["reconstruction"]
    assert reconstruction["features"]["weights"] == network.network.weights
    rows = reconstruction["distances"]
    assert (rows["held_out"]["num_real"], rows["training_images"]["num_other"]) == (50, 55)
    assert rows["held_out"]["kid_inception_features"] is not None
    assert not any("lite0" in name for name in rows["held_out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--inception", "weights.pth"],
            "--inception: weights.pth: is what distances are measured in: give --distance",
        ),
        (["--inception", "weights.pth", "--distance-images", "9"], "--inception: weights.pth: no such file"),
        (["--clip-english"], "--clip-english: True: is for the captions of --clip"),
        (["--clip", "nowhere"], "--clip: nowhere: no such folder"),
        (["--metrics", "fid"], "--metrics: fid: is none"),
    ],
)
def test_bad_options_are_named_before_the_model_is_read(
    options: list[str], message: str, pairs: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "no-model"), str(pairs), "--out", str(tmp_path / "e.json"), *options]
    )
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith(message)
