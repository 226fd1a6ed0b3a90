"""KoCLIP's pickled modules: both heads, timm's names, and what is no KoCLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config.ranker import KoclipConfig
from engine.errors import InputError
from engine.interop.importing import import_checkpoint
from engine.models.folder import load_part
from engine.models.koclip import KoClip
from tests.engine.interop.layouts import importable, module_of, save_module, timm_names

TINY = KoclipConfig(
    image_width=0.3, image_depth=0.05, image_hidden_dim=384, text_vocab_size=60, text_seq_len=30, text_dim=24,
    text_layers=2, text_heads=2, text_ff_dim=32, text_position_rows=32, embed_dim=16, head="linear",
    similarity="published",
)  # fmt: skip
BLOCKS = [(stage, 0) for stage in range(7)]


def _koclip(config: KoclipConfig) -> KoClip:
    torch.manual_seed(5)
    model = KoClip(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.3)
    return model


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_imported_koclips_score_the_same(head: str, tmp_path: Path) -> None:
    config = TINY.model_copy(update={"head": head})
    original = _koclip(config)
    save_module(timm_names(original.state_dict(), BLOCKS), tmp_path / "clip.pt", "clipmodel", "CLIPModel")
    found = import_checkpoint(tmp_path / "clip.pt", tmp_path / "model")
    # No pickled RobertaConfig in this file: 64 channels a head are assumed, which 24 channels do not have.
    assert found.parts["koclip"].config == config.model_copy(update={"text_heads": 1})
    imported = load_part(tmp_path / "model", "koclip")
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert torch.equal(imported.embed_images(images), original.embed_images(images))
    assert all(torch.equal(imported.state_dict()[name], value) for name, value in original.state_dict().items())


def test_heads_come_from_the_pickled_config(tmp_path: Path) -> None:
    model = module_of(timm_names(_koclip(TINY).state_dict(), BLOCKS), "clipmodel", "CLIPModel")
    config = type("RobertaConfig", (), {"__module__": "transformers.models.roberta.configuration_roberta"})()
    config.num_attention_heads = 2
    model.get_submodule("text_encoder.model").config = config
    with importable(model, config):
        torch.save(model, tmp_path / "clip.pt")
    assert import_checkpoint(tmp_path / "clip.pt", tmp_path / "model").parts["koclip"].config == TINY


def test_published_koclips_have_timms_constants() -> None:
    """timm pads on both sides and has a residual in every block that keeps its size; TensorFlow's EfficientNet does not."""
    encoder: Any = _koclip(TINY).image_encoder
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}
    pads = [
        block.depthwise_conv.depthwise_conv_pad.padding
        for block in encoder.encoder.blocks
        if block.depthwise_conv.stride == 2
    ]
    assert len(pads) == 4
    assert all(left == right and top == bottom for left, right, top, bottom in pads)
    ours = _koclip(TINY.model_copy(update={"similarity": "cosine"})).image_encoder
    assert {module.eps for module in ours.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    narrow = {"image_width": 0.1, "image_hidden_dim": 128}  # whose first block keeps 8 channels
    for similarity, has_residual in (("published", True), ("cosine", False)):
        narrowed: Any = _koclip(TINY.model_copy(update=narrow | {"similarity": similarity})).image_encoder
        first = narrowed.encoder.blocks[0]
        assert first.projection.apply_dropout == has_residual


def _stem_by_hand(model: KoClip, images: Tensor) -> Tensor:
    encoder: Any = model.image_encoder
    embeddings = encoder.embeddings
    stream = nn.functional.conv2d(images, embeddings.convolution.weight, stride=2, padding=1)
    norm = embeddings.batchnorm
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    stream = (stream - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return nn.functional.silu(stream)


@torch.no_grad()
def test_the_stem_is_timms() -> None:
    model, images = _koclip(TINY), torch.rand(2, 3, 32, 32)
    encoder: Any = model.image_encoder
    torch.testing.assert_close(encoder.embeddings(images), _stem_by_hand(model, images))


def test_served_pixels_are_neither_resized_nor_scaled() -> None:
    """What KoDALLE's sampling handed to a KoCLIP that was trained on 224 pixels of 0 to 255."""
    model = _koclip(TINY.model_copy(update={"pixels": "served"}))
    images = torch.rand(2, 3, 64, 64)
    assert model.prepare(images) is images
    trained = KoClip(TINY).prepare(images)
    assert trained.shape == (2, 3, 224, 224)
    assert trained.max() > 200
    torch.testing.assert_close(
        KoclipEncoder(model).embed_images(images), model.embed_images(images), atol=1e-5, rtol=1e-4
    )


def test_what_is_no_koclip_is_refused(tmp_path: Path) -> None:
    tensors = timm_names(_koclip(TINY).state_dict(), BLOCKS)
    older = {name: value for name, value in tensors.items() if not name.startswith("image_encoder")}
    save_module(
        older | {"image_encoder.model.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "a.pt", "clipmodel", "M"
    )
    with pytest.raises(InputError, match=r"its encoders are not EfficientNet and RoBERTa .*ResNet-50 and DistilBERT"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "model")
    wider = tensors | {"image_encoder.model.conv_stem.weight": torch.zeros(24, 3, 3, 3)}
    save_module(wider, tmp_path / "b.pt", "clipmodel", "CLIPModel")
    with pytest.raises(InputError, match=r"its image encoder has \[24, .* channels, as no EfficientNet"):
        import_checkpoint(tmp_path / "b.pt", tmp_path / "model")
    save_module({"weight": torch.zeros(120, 32)}, tmp_path / "c.pt", "clipmodel", "Other")
    with pytest.raises(InputError, match="is of no known kind, its tensors are weight"):
        import_checkpoint(tmp_path / "c.pt", tmp_path / "model")
