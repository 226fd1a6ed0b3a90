"""dVAE training: ranks and accumulation, its learning rate, and everything that a KoDALLE on its codes goes through."""

import asyncio
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import cli
from engine.commands.fine_tune import keeps_its_codec
from engine.config_files import load_run, parse_run
from engine.config_folders import check_folders
from engine.data.pairs import load_image, load_pairs
from engine.data.token_shards import open_shards
from engine.errors import InputError
from engine.metrics.evaluate import evaluate
from engine.models.folder import load_part
from engine.models.openai_dvae import OpenaiDvae
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams
from engine.training.plan.configs import read_base
from engine.training.plan.facts import MachineFacts
from engine.training.plan.fine_tuning import fine_tuning_tree
from engine.training.process_group import free_port
from serve.messages import Finished, GenerationJob
from serve.settings import ServeSettings
from serve.worker.worker import Worker
from tests.conftest import SIZE
from tests.engine.training.test_ranks import train_as_rank
from tests.engine.training.test_trainer import PRELOAD, Losses, Train, Tree, TreeOf, close, same_norms
from tests.forked import run_forked

CAPTION = "빨강 바탕에 파랑 네모"
GRID = SIZE // 8


def _exact(tree: Tree, micro_batch: int, accumulated: int = 1) -> Tree:
    """With an optimiser that is insensitive to rounding."""
    tree["deepspeed"]["optimizer"]["params"]["eps"] = 1e-3
    tree["deepspeed"] |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulated}
    tree["loop"] |= {"steps": 4, "validate_every": 4, "sample_every": 4, "checkpoint_every": 4}
    return tree


def test_two_ranks_and_two_micro_batches_equal_one_batch(
    tree_of: TreeOf, train_tree: Train, write_tree: Callable[..., Path], losses: Losses, tmp_path: Path
) -> None:
    """An image's noise is its visit's, whoever computes it."""
    one = train_tree(_exact(tree_of("dvae", tmp_path / "one"), 4))
    two = train_tree(_exact(tree_of("dvae", tmp_path / "two"), 2, accumulated=2))
    file = write_tree(_exact(tree_of("dvae", tmp_path / "ranks"), 2), tmp_path / "ranks.yaml")
    port = free_port()
    jobs: list[Any] = [(train_as_rank, (rank, 2, port, [file])) for rank in range(2)]
    answers = run_forked(jobs, tmp_path, preload=PRELOAD)
    assert [code for code, _ in answers] == [0, 0], answers
    for run, model in ((tmp_path / "two", two), (tmp_path / "ranks", tmp_path / "ranks" / "model")):
        close(model, one, 1e-5, part="vqgan")
        same_norms(run, tmp_path / "one", losses)
    logged = [[line["loss"] for line in losses(tmp_path / name) if "loss" in line] for name in ("one", "two", "ranks")]
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[2] == pytest.approx(logged[0], rel=1e-4)


def test_schedules_follow_the_steps(dvae_run: Path, losses: Losses) -> None:
    lines = [line for line in losses(dvae_run) if "loss" in line]
    halves = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    quarters = [(1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(8)]
    assert [line["temperature"] for line in lines] == pytest.approx([1 / 16 + 15 / 16 * half for half in halves])
    assert [line["kl_weight"] for line in lines] == pytest.approx([6.6 * (1 - quarter) for quarter in quarters])
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (0.1 + 0.9 * quarter) for quarter in quarters])


def test_it_learns(tree_of: TreeOf, train_tree: Train, losses: Losses, tmp_path: Path) -> None:
    tree = tree_of("dvae", tmp_path / "run", kl_weight={"start": 6.6, "end": 6.6}, least_scale=0.05, augment_shift=0)
    del tree["lr_schedule"]
    tree["deepspeed"]["optimizer"]["params"]["lr"] = 3e-3
    tree["loop"] |= {"steps": 60, "validate_every": 30, "sample_every": 60, "checkpoint_every": 60}
    assert load_part(train_tree(tree), "vqgan").config.family == "openai-dvae"
    lines = losses(tmp_path / "run")
    nll = [line["nll"] for line in lines if "nll" in line]
    assert sum(nll[-10:]) / 10 < sum(nll[:10]) / 10 - 0.2
    assert 0.3 < lines[-2]["kl"] < math.log(32)  # of it as many nats does a code say of its patch
    assert lines[-1]["validation_psnr_db"] == pytest.approx(-10 * math.log10(lines[-1]["validation_mse"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": {"start": 1.0, "end": 0.0}}, "temperature.end: 0 has no gradient"),
        ({"temperature": {"start": -1.0, "end": 0.1}}, "temperature.start: -1.0: .*greater than or equal"),
        ({"kl_weight": {"start": 0.0, "end": 6.6, "steps": 0}}, "kl_weight.steps: 0: .*greater than 0"),
        ({"kl_weight": 6.6}, "kl_weight: 6.6: "),
        ({"least_scale": -0.1}, "least_scale: -0.1: .*greater than or equal"),
        ({"model": {"image_size": 36}}, "model.image_size: 36: .*multiple of 8"),
        (
            {"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {}}}},
            "lr_schedule: deepspeed.scheduler states the rate, too: leave one of them out",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    changes: Tree, message: str, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train_tree(tree_of("dvae", tmp_path / "run") | changes)
    assert "\n" not in str(caught.value)


def test_it_does_not_start_from_another_family(
    vqgan_run: Path, dvae_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    for stage, other, theirs in (("dvae", vqgan_run, "vqgan"), ("vqgan", dvae_run, "openai-dvae")):
        tree = tree_of(stage, tmp_path / stage, start_from=str(other / "model"))
        with pytest.raises(InputError, match=rf"start_from: .*model.family is .*, there {theirs}"):
            train_tree(tree)


# -------------------------------------------------------------------------------------------------- a KoDALLE on its codes


@pytest.fixture(scope="module")
def model(
    dvae_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    """A KoDALLE of two steps on the session's dVAE, ranked by the session's KoCLIP, whose VQGAN was another codec."""
    run = tmp_path_factory.mktemp("kodalle") / "run"
    tree = tree_of("kodalle", run, vqgan=str(dvae_run / "model"), augmented_views=1, augment_shift=2)
    tree["model"] = dict(tree["model"]) | {"image_vocab_size": "auto", "image_grid_size": "auto"}
    tree["loop"] |= {"steps": 2, "validate_every": 2, "sample_every": 2, "checkpoint_every": 2}
    return train_tree(tree)


def test_token_shards_hold_the_codes_without_noise(model: Path, dvae_run: Path, pairs_folder: Path) -> None:
    dvae = load_part(dvae_run / "model", "vqgan")
    assert isinstance(dvae, OpenaiDvae)
    held = open_shards(model.parent / "shards", "validation", image_vocab_size=32, text_vocab_size=64)
    images = np.stack([load_image(pair, SIZE) for pair in load_pairs(pairs_folder).validation])
    codes = dvae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    stored = [held.pick(number, np.random.default_rng(0))[1].tolist() for number in range(len(held))]
    assert stored == codes.tolist()


def test_kodalle_generate(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, with the pipeline's pixels; from an init image; with `--int8`, which this family's decoder has none of."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (SIZE, SIZE), (200, 40, 40)).save("photo.png")
    files: dict[str, list[Path]] = {}
    for name, more in (("plain", []), ("started", ["--image", "photo.png", "--keep-rows", "2"]), ("int8", ["--int8"])):
        command = ["kodalle", "generate", str(model), CAPTION, "--candidates", "2", "--top", "2", "--seed", "7"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", name, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        made = json.loads((Path(name) / "result.json").read_text(encoding="utf-8"))["candidates"]
        files[name] = [Path(name) / one["file"] for one in made]
        assert len(files[name]) == 2
    pipeline = Pipeline.from_pretrained(model)
    expected = pipeline([CAPTION], SamplingParams(seed=7, candidates=2, top=2))[0].candidates
    shown = [np.asarray(Image.open(path).convert("RGB")) for path in files["plain"]]
    assert all(np.array_equal(ours, np.asarray(one.image)) for ours, one in zip(shown, expected, strict=True))


def test_a_worker_serves_it(model: Path) -> None:
    params = SamplingParams(seed=5, candidates=2, top=2)
    worker = Worker(ServeSettings(model=str(model), num_slots=4, max_queued_sequences=16))

    async def events() -> list[Any]:
        async with asyncio.timeout(60):
            job = GenerationJob("one", "key", CAPTION, params, deadline_s=60.0, wants_all=True)
            return [event async for event in worker.generate(job)]

    try:
        finished = asyncio.run(events())[-1]
    finally:
        worker.close()
    assert isinstance(finished, Finished), finished
    alone = Pipeline.from_pretrained(model)([CAPTION], params)[0].candidates
    for ours, theirs in zip(finished.images, alone, strict=True):
        assert ours.data is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(ours.data)).convert("RGB")), np.asarray(theirs.image))


def test_it_is_evaluated(model: Path, pairs_folder: Path) -> None:
    found = evaluate(model, pairs_folder, generations=1, candidates=2)
    assert found["reconstruction"]["images"] == 6
    assert found["generations"]["captions"] == 1


def test_auto_finds_the_dvae_beside_the_run(
    dvae_run: Path, tree_of: TreeOf, write_tree: Callable[..., Path], tmp_path: Path
) -> None:
    """Where no VQGAN is beside it."""
    shutil.copytree(dvae_run / "model", tmp_path / "dvae" / "model")
    tree = tree_of("kodalle", tmp_path / "kodalle", vqgan="auto")
    run: Any = load_run(write_tree(tree, tmp_path / "run.yaml"))
    assert run.vqgan == tmp_path / "dvae" / "model"
    shutil.copytree(dvae_run / "model", tmp_path / "vqgan" / "model")
    run = load_run(write_tree(tree, tmp_path / "run.yaml"))
    assert run.vqgan == tmp_path / "vqgan" / "model"


def test_it_is_trained_on_with_its_codec_and_ranker(model: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """`kodalle train PHOTOS --from` trains its transformer alone: the VQGAN's stage has other networks."""
    assert keeps_its_codec(model)
    machine = MachineFacts(device="cpu", name="test", cores=2, memory_bytes=2**33)
    tree = fine_tuning_tree(read_base(model), tmp_path, pairs_folder, load_pairs(pairs_folder), machine)
    assert (tree["vqgan"], tree["koclip"]) == (str(model), str(model))
    check_folders(parse_run(tree, source="test"))
