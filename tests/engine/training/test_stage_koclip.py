"""KoCLIP's training with EfficientNet-Lite0: learning rates of the encoders, frozen weights, what the folder holds."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config.codec import VqganConfig
from engine.config.stages import KoclipRun
from engine.config_files import load_run
from engine.data.pairs import load_image, load_pairs
from engine.models.efficientnet_lite0 import load_efficientnet_lite0
from engine.models.folder import Part, load_part, write_model_folder
from engine.models.koclip import KoClip
from engine.models.koclip_encoders import Lite0ImageEncoder
from engine.models.vqgan import Vqgan
from engine.training.process_group import join_world
from engine.training.stage_koclip import KoclipStage, _groups
from tests.conftest import SIZE, VQGAN

Tree = dict[str, Any]
MakeTree = Callable[..., Tree]
LR = 1e-3


@pytest.fixture
def lite0_tree(run_tree: MakeTree, tmp_path: Path) -> MakeTree:
    def make(**more: Any) -> Tree:
        tree = run_tree("koclip", tmp_path / "run", encoder_lr_ratio=1.0)
        sizes = {name: value for name, value in tree["model"].items() if not name.startswith("image_")}
        tree["model"] = sizes | {"image_size": 32, "image_encoder": "efficientnet-lite0"}
        tree["loop"] |= {"steps": 4, "validate_every": 4, "sample_every": 4, "checkpoint_every": 4}
        tree["deepspeed"]["optimizer"]["params"]["lr"] = LR
        return tree | more

    return make


@pytest.mark.parametrize(
    ("ratios", "text", "image"),
    [
        ({}, 1.0, 1.0),
        ({"encoder_lr_ratio": 0.8}, 0.8, 0.8),
        ({"image_encoder_lr_ratio": 0.1}, 1.0, 0.1),
        ({"encoder_lr_ratio": 0.8, "image_encoder_lr_ratio": 1.0}, 0.8, 1.0),
        ({"image_encoder_lr_ratio": 0.0}, 1.0, None),
    ],
)
def test_each_encoder_has_its_rate(
    ratios: Tree,
    text: float,
    image: float | None,
    lite0_tree: MakeTree,
    write_tree: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run = load_run(write_tree(lite0_tree(**ratios), tmp_path / "run.yaml"))
    assert isinstance(run, KoclipRun)
    model = KoClip(run.model)
    rates = {id(parameter): group["lr"] for group in _groups(model, run) for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in _groups(model, run))
    for name, parameter in model.named_parameters():
        expected = text if name.startswith("text_encoder.") else image if name.startswith("image_encoder.") else 1.0
        assert rates.get(id(parameter)) == (None if expected is None else pytest.approx(LR * expected)), name
        assert parameter.requires_grad == (expected is not None)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_starts_from_the_package_s_weights(
    ratio: float, lite0_tree: MakeTree, train_tree: Callable[[Tree], Path]
) -> None:
    """Frozen they stay; otherwise each moves by no more than Adam does in the two of four steps whose rate is not 0.

    Features are standardised in both.
    """
    model = train_tree(lite0_tree(image_encoder_lr_ratio=ratio, spliced_negatives=0.5))
    trained: KoClip = load_part(model, "koclip")
    assert isinstance(trained.image_encoder, Lite0ImageEncoder)
    published = load_efficientnet_lite0(field="test").state_dict()
    moved = max(
        float((weight - published[name]).abs().max())
        for name, weight in trained.image_encoder.network.state_dict().items()
    )
    assert moved == 0 if ratio == 0 else 0.1 * LR * ratio < moved < 3 * LR * ratio
    assert trained.image_encoder.feature_mean.abs().max() > 0
    weights = load_file(model / "koclip.safetensors")
    assert sum(math.prod(weights[name].shape) for name in weights if ".network." in name) == 3_350_000


def test_batches_of_both_splits_say_which_images_fit_which_captions(
    run_tree: MakeTree, write_tree: Callable[..., Path], tmp_path: Path
) -> None:
    run = load_run(write_tree(run_tree("koclip", tmp_path / "run"), tmp_path / "run.yaml"))
    assert isinstance(run, KoclipRun)
    stage = KoclipStage(run, join_world(torch_threads=None))
    assert stage.validation_source is not None
    for source in (stage.source, stage.validation_source):
        batch = source(0)
        size = len(batch["images"])
        assert batch["fits"].shape == (size, size)
        assert batch["fits"].diagonal().all()


def test_half_of_the_visits_see_the_codec_s_reconstruction(
    run_tree: MakeTree, write_tree: Callable[..., Path], pairs_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vqgan = Vqgan(VqganConfig(**VQGAN)).eval()
    write_model_folder(tmp_path / "codec", {"vqgan": Part(vqgan.config, vqgan.state_dict())}, card="")
    tree = run_tree("koclip", tmp_path / "run", augment_shift=0, codec=str(tmp_path / "codec"))
    tree["data"]["flip"] = False
    run = load_run(write_tree(tree, tmp_path / "run.yaml"))
    assert isinstance(run, KoclipRun)
    stage = KoclipStage(run, join_world(torch_threads=None))
    originals = torch.from_numpy(np.stack([load_image(pair, SIZE) for pair in load_pairs(pairs_folder).train]))
    originals = originals.permute(0, 3, 1, 2)
    decoded = vqgan.decode(vqgan.encode(originals.float() / 255)).clamp(0, 1).mul(255)
    seen = torch.cat([stage.source(number)["images"] for number in range(10)])
    reconstructed = 0
    for image in seen:
        if (image == originals).flatten(1).all(dim=1).any():
            continue
        # one grey level: rounding, and batches of another size
        assert float((image - decoded).abs().amax(dim=(1, 2, 3)).min()) <= 1
        reconstructed += 1
    assert 0.25 * len(seen) < reconstructed < 0.75 * len(seen)
