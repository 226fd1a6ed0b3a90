"""Transformers of KoDALLE and DALLE-pytorch: names of all versions, shared weights, padding, and switches that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import train_tokenizer
from engine.decoding.sampler import Sampler
from engine.errors import InputError
from engine.interop.importing import ImportOptions, import_checkpoint
from engine.models.folder import load_part
from engine.models.transformer import KoDalle
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.interop.test_importing_codecs import DISCRETE, VQGAN, _codec

KODALLE = TransformerConfig(
    dim=24, num_layers=2, num_heads=2, head_dim=8, text_vocab_size=50, text_seq_len=6, text_position_rows=20,
    image_vocab_size=40, image_grid_size=16,
)  # fmt: skip
DALLE = KODALLE.model_copy(
    update={"unique_padding": True, "text_position_rows": 7, "image_vocab_size": 30, "image_grid_size": 8}
)
REVERSIBLE = DALLE.model_copy(update={"reversible": True, "sandwich_norm": True, "stable": True})
TEXT = torch.tensor([[3, 4, 5, 0, 0, 0], [9, 8, 7, 6, 0, 2]])


def _model(config: TransformerConfig) -> KoDalle:
    torch.manual_seed(8)
    model = KoDalle(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def _their_name(name: str, wrapped: int, axial: str, reversible: bool) -> str:
    """A name of ours as a version of DALLE-pytorch writes it: `wrapped` times `fn.` before the attention's projections."""
    names = {
        "text_embedding.tokens": "text_emb.weight", "text_embedding.positions": "text_pos_emb.weight",
        "image_embedding.tokens": "image_emb.weight", "image_embedding.rows": f"image_pos_emb.weights{axial}0",
        "image_embedding.columns": f"image_pos_emb.weights{axial}1", "head.norm.weight": "to_logits.0.weight",
        "head.norm.bias": "to_logits.0.bias", "head.weight": "to_logits.1.weight", "head.bias": "to_logits.1.bias",
    }  # fmt: skip
    if name in names:
        return names[name]
    _, layer, branch, *rest = name.split(".")
    path = ".".join(rest)
    leaves = {"qkv": "to_qkv", "out": "to_out.0", "grow": "net.0", "shrink": "net.3"}
    place = f"transformer.layers.layers.{layer}.{0 if branch == 'attention' else 1}."
    if reversible:
        place = f"transformer.layers.blocks.{layer}.{'f' if branch == 'attention' else 'g'}.net."
    if path == "scale":
        return f"{place}scale"
    if path.startswith(("norm.", "norm_out.")):
        return f"{place}fn.{path}"
    return place + "fn." * (wrapped if branch == "attention" else 2) + f"{leaves[rest[0]]}.{rest[1]}"


def _shaped(name: str, value: Tensor) -> Tensor:
    """As DALLE-pytorch stores it: scales (1, 1, C), axial tables (1, g, 1, C) and (1, 1, g, C)."""
    if name.endswith("scale"):
        return value[None, None]
    if name == "image_embedding.rows":
        return value[None, :, None]
    return value[None, None] if name == "image_embedding.columns" else value


def _save(path: Path, config: TransformerConfig, *, wrapped: int = 2, axial: str = "_", **changes: Any) -> Path:
    """A checkpoint of train_dalle.py, or of KoDALLE's train.py, which has its VQGAN under `vae.model`."""
    is_kodalle = not config.unique_padding
    weights = {
        _their_name(name, wrapped, axial, config.reversible): _shaped(name, value)
        for name, value in _model(config).state_dict().items()
    }
    codec = _codec(VQGAN if is_kodalle else DISCRETE).state_dict()
    weights |= {f"vae.{'model.' if is_kodalle else ''}{name}": value for name, value in codec.items()}
    if is_kodalle:
        weights["vae.model.loss.discriminator.main.0.weight"] = torch.zeros(1).expand(64, 3)
    hparams: dict[str, Any] = {
        "num_text_tokens": 50, "text_seq_len": 6, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8, "reversible": False,
        "loss_img_weight": 7, "attn_types": ("full",), "ff_dropout": 0.0, "attn_dropout": 0.0, "stable": config.stable,
        "shift_tokens": False, "rotary_emb": False,
    }  # fmt: skip
    vae_params = {
        "image_size": 32, "num_layers": 2, "num_tokens": 30, "codebook_dim": 10, "hidden_dim": 12, "num_resnet_blocks": 1
    }  # fmt: skip
    content: dict[str, Any] = {
        "hparams": hparams,
        "vae_params": None if is_kodalle else vae_params,
        "version": "1.6.6",
        "weights": weights,
    }
    for key, value in changes.items():
        owner = weights if "." in key else hparams
        owner[key] = value
    content["opt_state"] = {"state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3)}}, "param_groups": []}
    torch.save(content, path)
    return path


CASES = {
    "KoDALLE": (KODALLE, 2, "_"),
    "DALLE-pytorch 1.1": (DALLE, 2, "_"),
    "DALLE-pytorch 1.6": (DALLE, 3, "_"),
    "axial tables of 0.3": (DALLE, 3, "."),
    "reversible, sandwich_norm and stable": (REVERSIBLE, 3, "_"),
}


@pytest.mark.parametrize("case", CASES)
def test_all_versions_names_are_read(case: str, tmp_path: Path) -> None:
    config, wrapped, axial = CASES[case]
    options = ImportOptions(image_size=32)
    found = import_checkpoint(
        _save(tmp_path / "a.pt", config, wrapped=wrapped, axial=axial), tmp_path / "model", options=options
    )
    assert found.kind == ("kodalle" if config is KODALLE else "dalle")
    assert found.parts["transformer"].config == config
    original, imported = _model(config).state_dict(), load_part(tmp_path / "model", "transformer").state_dict()
    assert original.keys() == imported.keys()
    assert all(torch.equal(imported[name], value) for name, value in original.items())
    codec = load_part(tmp_path / "model", "vqgan")
    assert codec.config == (VQGAN if config is KODALLE else DISCRETE)


def test_embeddings_of_the_head_become_tables(tmp_path: Path) -> None:
    model = _model(DALLE)
    head: dict[str, Any] = {"text_emb.linear.weight": model.head.weight, "text_emb.linear.bias": model.head.bias}
    head |= {name.replace("text", "image"): value for name, value in head.items()}
    path = _save(tmp_path / "a.pt", DALLE, wrapped=3, **{name: value.detach() for name, value in head.items()})
    content = torch.load(path)
    for name in ("text_emb.weight", "image_emb.weight"):
        del content["weights"][name]
    torch.save(content, path)
    found = import_checkpoint(path, tmp_path / "model")
    assert any("which training on no longer ties" in note for note in found.notes)
    imported: KoDalle = load_part(tmp_path / "model", "transformer")
    assert torch.equal(imported.text_embedding.tokens, model.head.weight[:56])
    assert torch.equal(imported.image_embedding.tokens, model.head.weight[56:])


def test_a_text_none_is_a_switch_that_is_on(tmp_path: Path) -> None:
    """KoDALLE's yaml has `STABLE: None`, a text, which was true where its model read it."""
    found = import_checkpoint(_save(tmp_path / "a.pt", DALLE, stable="None"), tmp_path / "model")
    assert found.parts["transformer"].config == DALLE.model_copy(update={"stable": True})


# ------------------------------------------------------------------------------------------------- padding of its own


@torch.no_grad()
def test_each_padded_position_has_a_row_of_its_own() -> None:
    """A model whose caller writes text_vocab_size + position for padding computes the same, cached too."""
    model = _model(DALLE)
    by_hand = torch.tensor([[3, 4, 5, 53, 54, 55], [9, 8, 7, 6, 54, 2]])
    plain = KoDalle(DALLE.model_copy(update={"unique_padding": False, "text_vocab_size": 56}))
    tokens = torch.arange(64)[None] % 30
    tokens = tokens.expand(2, -1)
    joint = {name: value for name, value in model.state_dict().items() if not name.startswith("head")}
    plain.load_state_dict(plain.state_dict() | joint)
    assert torch.equal(model.text_embedding(TEXT), plain.text_embedding(by_hand))
    assert torch.equal(model.text_embedding(TEXT), model.text_embedding(by_hand))
    losses, expected = model(TEXT, tokens), model(by_hand, tokens)
    assert torch.equal(losses.loss, expected.loss)
    text_logits, _ = model.logits(by_hand, tokens)
    torch.testing.assert_close(losses.loss_text, F.cross_entropy(text_logits.flatten(0, 1), by_hand.flatten()))
    sampler = Sampler(model, speculative=False)
    requests = [SequenceRequest(number, SamplingParams(temperature=0)) for number in range(2)]
    assert torch.equal(sampler.generate(TEXT, requests), sampler.generate(by_hand, requests))


def test_rows_of_padding_are_trained() -> None:
    model = _model(DALLE)
    model(TEXT, torch.zeros(2, 64, dtype=torch.int64)).loss.backward()
    gradient = model.text_embedding.tokens.grad
    assert gradient is not None
    assert (gradient[53:56].abs().sum(dim=1) > 0).all()
    assert gradient[50:53].abs().sum() == 0  # the first positions are padded in neither caption


# ------------------------------------------------------------------------------------------------------------- use


def test_an_imported_kodalle_generates(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red shirt"], vocab_size=40)
    tokenizer.save(tmp_path / "tokenizer")
    options = ImportOptions(image_size=32, tokenizer=str(tmp_path / "tokenizer"))
    import_checkpoint(_save(tmp_path / "a.pt", KODALLE), tmp_path / "model", kind="kodalle", options=options)
    generation = Pipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)(
        ["a red shirt"], candidates=2, seed=1
    )[0]
    assert generation.candidates[0].image.size == (32, 32)


def test_padding_must_be_0_for_a_dalle(tmp_path: Path) -> None:
    """A tokenizer that pads with 1 would write words where this model expects padding."""
    train_tokenizer(["a red shirt"], vocab_size=40).save(tmp_path / "tokenizer")
    options = ImportOptions(tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(
        InputError, match=r"--tokenizer: .*: pads with 1, and a model with unique_padding reads 0 as padding"
    ):
        import_checkpoint(_save(tmp_path / "a.pt", DALLE), tmp_path / "model", options=options)


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("changes", "switch"),
    [
        ({"attn_types": ("full", "sparse")}, "attn_types: sparse"),
        ({"attn_types": "mlp"}, "attn_types: mlp"),
    ],
)  # fmt: skip
def test_other_switches_are_refused_by_name(changes: dict[str, Any], switch: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"hparams {switch}: are not supported: only full, axial and conv_like are"):
        import_checkpoint(_save(tmp_path / "a.pt", DALLE, **changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hparams depth: 3: its tensors say 2"):
        import_checkpoint(_save(tmp_path / "a.pt", DALLE, depth=3), tmp_path / "model")
    changes: dict[str, Any] = {"transformer.layers.layers.1.1.fn.fn.net.3.bias": torch.zeros(25)}
    with pytest.raises(InputError, match=r"layers.1.feed_forward.shrink.bias: \[25\]: .* require \[24\]"):
        import_checkpoint(_save(tmp_path / "a.pt", DALLE, **changes), tmp_path / "model")
    with pytest.raises(InputError, match="its transformer has 16x16 of 40 tokens, its codec 128x128 of 40"):
        import_checkpoint(
            _save(tmp_path / "a.pt", KODALLE), tmp_path / "model"
        )  # 256 pixels are assumed without a yaml
    torch.save({"hparams": {"image_size": 32}, "weights": _codec(DISCRETE).state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(InputError, match="--tokenizer: x: a DALLE-pytorch DiscreteVAE has no transformer"):
        import_checkpoint(tmp_path / "vae.pt", tmp_path / "model", options=ImportOptions(tokenizer="x"))
