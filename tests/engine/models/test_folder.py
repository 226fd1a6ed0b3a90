"""The model folder: what is written is what is loaded, and every fault has a name."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config.codec import VqganConfig
from engine.config.generation import GenerationConfig
from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.data.caption_guide import CaptionGuide, read_guide
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError
from engine.models import folder as model_folder
from engine.models.folder import Part, convert_model_folder, load_part, read_part, write_model_folder
from engine.models.folder_config import PartName, read_generation, read_ground, weights_digest
from engine.models.koclip import KnownPairs, KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from tests.paths import REPOSITORY

CONFIGS = {
    "vqgan": VqganConfig(
        image_size=16, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(),
        latent_channels=8, embed_dim=4, codebook_size=8,
    ),
    "transformer": TransformerConfig(
        dim=16, num_layers=1, num_heads=2, head_dim=8, text_vocab_size=20, text_seq_len=4, text_position_rows=5,
        image_vocab_size=8, image_grid_size=2,
    ),
    "koclip": KoclipConfig(
        image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=20, text_seq_len=4,
        text_dim=16, text_layers=1, text_heads=2, text_ff_dim=16, text_position_rows=6, embed_dim=8,
    ),
}  # fmt: skip
PARTS: list[PartName] = ["vqgan", "transformer", "koclip"]
FILE = "transformer.safetensors"


def _modules() -> dict[PartName, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "vqgan": Vqgan(CONFIGS["vqgan"]),  # type: ignore[arg-type]
        "transformer": KoDalle(CONFIGS["transformer"]),  # type: ignore[arg-type]
        "koclip": KoClip(CONFIGS["koclip"]),  # type: ignore[arg-type]
    }


def _write(folder: Path, dtype: torch.dtype | None = None) -> dict[PartName, torch.nn.Module]:
    modules = _modules()
    parts = {name: Part(CONFIGS[name], module.state_dict()) for name, module in modules.items()}
    write_model_folder(folder, parts, card="# 카드\n", dtype=dtype)
    return modules


@pytest.fixture
def model(tmp_path: Path) -> Path:
    module = KoDalle(CONFIGS["transformer"])  # type: ignore[arg-type]
    write_model_folder(
        tmp_path / "model", {"transformer": Part(CONFIGS["transformer"], module.state_dict())}, card="card"
    )
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saved_and_loaded_are_the_same(tmp_path: Path, dtype: torch.dtype | None) -> None:
    modules = _write(tmp_path / "model", dtype)
    for name in PARTS:
        loaded = load_part(tmp_path / "model", name)
        assert not loaded.training
        assert loaded.config == CONFIGS[name]
        state = loaded.state_dict()
        for key, own in modules[name].state_dict().items():
            expected = own.to(dtype).float() if dtype is not None and own.is_floating_point() else own
            assert state[key].dtype == own.dtype
            assert torch.equal(state[key], expected), (name, key)
    stored = load_file(tmp_path / "model" / FILE)
    assert {value.dtype for value in stored.values()} == {dtype or torch.float32}


def test_no_pickles_and_no_code_inside(kodalle_run: Path) -> None:
    files = [path for path in (kodalle_run / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != "SHA256SUMS"} <= {".json", ".safetensors", ".md", ".txt"}
    assert {path.name for path in files} >= {
        "config.json", "transformer.safetensors", "vqgan.safetensors", "koclip.safetensors", "tokenizer.json",
        "model_card.md",
    }  # fmt: skip
    for path in files:  # PROTO opcode of a pickle, PK of a zip (what torch.save writes)
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK")


def test_others_may_read_it(model: Path) -> None:
    """A cluster's transformers often run as another user than the training did."""
    assert {path.name: path.stat().st_mode & 0o777 for path in model.iterdir()} == dict.fromkeys(
        ("config.json", FILE, "model_card.md", "SHA256SUMS"), 0o644
    )


def test_replaces_a_model_but_nothing_else(model: Path, tmp_path: Path) -> None:
    _write(model)
    assert load_part(model, "vqgan").config == CONFIGS["vqgan"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("precious")
    with pytest.raises(InputError, match="holds something other than a model"):
        _write(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "a.txt").read_text() == "precious"


def test_digest_follows_weights_and_config(model: Path) -> None:
    digest = weights_digest(model, "transformer")
    weights = load_file(model / FILE)
    save_file(weights, model / FILE)
    config = json.loads((model / "config.json").read_text())
    assert weights_digest(model, "transformer") == digest
    weights["head.bias"][0] += 1
    save_file(weights, model / FILE)
    changed = weights_digest(model, "transformer")
    assert changed != digest
    config["transformer"]["ff_dropout"] = 0.5
    (model / "config.json").write_text(json.dumps(config))
    assert weights_digest(model, "transformer") not in (digest, changed)


def _change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / FILE)
        change(weights)
        save_file(weights, folder / FILE)

    return apply


def _change_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weight file": (lambda folder: (folder / FILE).unlink(), rf"weight file: .*{FILE}: is missing"),
    "missing tensor": (
        _change_weights(lambda weights: weights.pop("head.bias")),
        rf"{FILE}: head\.bias: tensor is missing \(1 in all\)",
    ),
    "extra tensor": (
        _change_weights(lambda weights: weights.update({"head.extra": torch.zeros(1)})),
        rf"{FILE}: head\.extra: unexpected tensor \(1 in all\)",
    ),
    "wrong shape": (
        _change_weights(lambda weights: weights.update({"head.bias": torch.zeros(3)})),
        r"head\.bias: \[3\]: config.json requires shape \[32\]",
    ),
    "truncated": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-10]),
        rf"{FILE}: is not a complete safetensors file",
    ),
    "empty": (lambda folder: (folder / FILE).write_bytes(b""), rf"{FILE}: is not a complete safetensors file"),
    "a pickle": (
        lambda folder: torch.save({"head.bias": torch.zeros(3)}, folder / FILE),
        rf"{FILE}: is not a complete safetensors file",
    ),
    "format": (_change_config(lambda config: config.update(format=2)), r"config\.json format: 2: this version reads"),
    "no format": (
        _change_config(lambda config: config.pop("format")),
        r"config\.json format: None: this version reads",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json format: \[\]"),
    "unknown key": (
        _change_config(lambda config: config["transformer"].update(dimm=3)),  # type: ignore[attr-defined]
        r"dimm: 3: unknown key.*config\.json",
    ),
    "other sizes": (
        _change_config(lambda config: config["transformer"].update(dim=32)),  # type: ignore[attr-defined]
        r"config.json requires shape \[.*32.*\]",
    ),
    "millions of layers": (
        _change_config(lambda config: config["transformer"].update(num_layers=3_000_000)),  # type: ignore[attr-defined]
        r"num_layers: 3000000: at most 1,000 can be read, in .*config\.json",
    ),
    "a vocabulary of any size": (
        _change_config(lambda config: config["transformer"].update(text_vocab_size=10**4000)),  # type: ignore[attr-defined]
        r"text_vocab_size: 10{39}: at most 1,048,576",
    ),
    "a list of any length": (
        _change_config(lambda config: config["transformer"].update(attention_patterns=["full"] * 1001)),  # type: ignore[attr-defined]
        "attention_patterns: 1001 entries: at most 1000",
    ),
    "5,000 digits": (
        lambda folder: (folder / "config.json").write_text('{"format": 1' + "0" * 5000 + "}"),
        r"config\.json: is not JSON",
    ),
    "NaN": (
        _change_weights(lambda weights: weights["head.bias"].fill_(float("nan"))),
        rf"{FILE} head\.bias: NaN or infinite: a weight must be a finite number",
    ),
    "one infinity": (
        _change_weights(lambda weights: weights["head.bias"][:1].fill_(float("inf"))),
        rf"{FILE} head\.bias: NaN or infinite",
    ),
    "integers": (
        _change_weights(lambda weights: weights.update({"head.bias": weights["head.bias"].to(torch.int64)})),
        rf"{FILE} head\.bias: int64: must hold floating-point numbers",
    ),
    "other weights": (
        _change_weights(lambda weights: weights["head.bias"].add_(1)),
        rf"model folder: .*{FILE}: is not what was exported: fetch the model again, or, if you changed it, renew SHA256SUMS",
    ),
    "another config": (
        _change_config(lambda config: config["transformer"].update(ff_dropout=0.5)),  # type: ignore[attr-defined]
        r"model folder: .*config\.json: is not what was exported",
    ),
    "sums without it": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  a\n"),
        r"config\.json: is not in SHA256SUMS",
    ),
    "no sums": (lambda folder: (folder / "SHA256SUMS").write_text("abc"), "abc: is no line of sha256sum"),
    "no such part": (_change_config(lambda config: config.pop("transformer")), "has no transformer .it holds: none."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(model: Path, fault: str) -> None:
    break_it, message = FAULTS[fault]
    break_it(model)
    with pytest.raises(InputError, match=message) as caught:
        load_part(model, "transformer")
    assert "\n" not in str(caught.value)


def test_sums_are_those_of_sha256sum_and_optional(model: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=model, capture_output=True, text=True, check=True)
    assert checked.stdout == f"config.json: OK\n{FILE}: OK\n"
    (model / "generation_config.json").write_text('{"top_k": 5}')  # people edit it
    (model / "model_card.md").write_text("another")
    load_part(model, "transformer")
    _change_weights(lambda weights: weights["head.bias"].add_(1))(model)
    renewed = "sha256sum config.json *.safetensors > SHA256SUMS"
    subprocess.run(renewed, shell=True, cwd=model, check=True)
    load_part(model, "transformer")
    _change_weights(lambda weights: weights["head.bias"].add_(1))(model)
    (model / "SHA256SUMS").unlink()  # as in folders from before there were sums
    load_part(model, "transformer")


@pytest.mark.parametrize("name", ["clothing", "garments"])
def test_shipped_models_have_the_sums_of_their_files(name: str) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=REPOSITORY / "models" / name, check=True)


def _with_tokenizer(model: Path) -> Path:
    train_tokenizer(["a b"], vocab_size=10).save(model)
    (model / "SHA256SUMS").unlink()
    return model / "tokenizer.json"


def test_token_numbers_beyond_the_table_are_refused(model: Path) -> None:
    path = _with_tokenizer(model)
    assert model_folder.load_folder_tokenizer(model).num_rows <= 20
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["far"] = 20
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"with 21 entries: the transformer's token table has 20 rows"):
        model_folder.load_folder_tokenizer(model)


def test_a_tokenizer_that_expands_is_refused_before_it_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _with_tokenizer(model)
    tree = json.loads(path.read_text())
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    tree["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 9}
    path.write_text(json.dumps(tree))
    monkeypatch.setattr("engine.data.tokenizer_files.Tokenizer", None)  # nothing of it runs
    with pytest.raises(InputError, match="may make a text more than 2,000 times as long"):
        model_folder.load_folder_tokenizer(model)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model folder: .*none: no such folder"):
        load_part(tmp_path / "none", "vqgan")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        model_folder.load_folder_tokenizer(tmp_path)


def test_sizes_are_compared_before_anything_is_allocated(model: Path) -> None:
    """A hundred-billion-parameter config over a small file must fail by name, not by memory."""
    _change_config(lambda config: config["transformer"].update(dim=2**17, num_layers=64))(model)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="tensor is missing"):
        read_part(model, "transformer")


def _tensors(folder: Path, name: PartName) -> dict[str, Tensor]:
    """Weights, buffers and outputs of a loaded network."""
    module = load_part(folder, name)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float32)
    text_tokens, image_tokens = torch.tensor([[0, 7, 2, 1], [0, 9, 8, 2]]), torch.tensor([[0, 1, 2, 3], [7, 7, 5, 0]])
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        if name == "vqgan":
            found |= {"reconstruction": module(images)[0], "tokens": module.encode(images)}
            found |= {"decoded": module.decode(found["tokens"])}
        elif name == "transformer":
            found |= dict(zip(("text", "image"), module.logits(text_tokens, image_tokens), strict=True))
        else:
            found |= {"scores": module.similarity(images, text_tokens)}
            found |= {"loss": module(images, text_tokens, known=KnownPairs(images[:1]))}
    return found


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", PARTS)
def test_torchs_default_dtype_does_not_matter(name: PartName, default: torch.dtype, tmp_path: Path) -> None:
    _write(tmp_path / "model")
    expected = _tensors(tmp_path / "model", name)
    assert {value.dtype for value in expected.values()} <= {torch.float32, torch.int64}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = _tensors(tmp_path / "model", name)
    finally:
        torch.set_default_dtype(before)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", PARTS)
def test_new_networks_are_float32_under_another_default(name: PartName) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        module = _modules()[name]
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in module.state_dict().values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_converted_weights_are_the_originals_rounded(kodalle_run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source, out = kodalle_run / "model", tmp_path / "small"
    size = convert_model_folder(source, out, dtype=dtype)
    assert size == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert size < (0.6 if dtype.itemsize == 2 else 1.1) * sum(
        path.stat().st_size for path in source.glob("*.safetensors")
    )
    for name in PARTS:
        original, converted = read_part(source, name).weights, read_part(out, name).weights
        for key, value in original.items():
            expected = value.to(dtype).float() if value.is_floating_point() else value
            assert torch.equal(converted[key], expected), (name, key)
    for file in ("config.json", "tokenizer.json"):
        assert json.loads((out / file).read_text()) == json.loads((source / file).read_text())
    assert f"Converted to {str(dtype)[6:]}" in (out / "model_card.md").read_text()


def test_sampling_defaults_and_attributes_are_stored_and_converted(tmp_path: Path) -> None:
    source = tmp_path / "model"
    parts = {"transformer": Part(CONFIGS["transformer"], KoDalle(CONFIGS["transformer"]).state_dict())}  # type: ignore[arg-type]
    write_model_folder(source, parts, card="card")  # type: ignore[arg-type]
    assert not (source / "generation_config.json").exists()
    assert (read_generation(source), read_guide(source)) == (GenerationConfig(), CaptionGuide())
    generation = GenerationConfig(temperature=0.7, top_p=0.95, guidance_scale=1.5)
    attributes = {"상의": {"색상": ["블랙", "화이트"], "카테고리": ["티셔츠"]}}
    guide = CaptionGuide(examples=("빨강 네모",), attributes=attributes, form=kfashion_form())
    write_model_folder(source, parts, card="card", generation=generation, caption_guide=guide)  # type: ignore[arg-type]
    convert_model_folder(source, tmp_path / "small", dtype=torch.float16)
    for folder in (source, tmp_path / "small"):
        assert read_generation(folder) == generation
        assert read_guide(folder) == guide
    for text, field in (
        ('{"temperature": -1}', "temperature"),
        ('{"temprature": 1}', "temprature"),
        ('{"top_p": 0}', "top_p"),
        ("[1]", ""),
        ("{", "model folder"),
    ):
        (source / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=r"generation_config\.json") as raised:
            read_generation(source)
        assert field in raised.value.field
    (source / "captions.json").write_text('{"attributes": {"상의": ["블랙"]}}')
    with pytest.raises(InputError, match=r"상의.*captions\.json"):
        read_guide(source)


def test_the_ground_is_stored_and_converted(model: Path, tmp_path: Path) -> None:
    assert read_ground(model) is None
    assert "ground" not in json.loads((model / "config.json").read_text())
    part = {"transformer": read_part(model, "transformer")}
    write_model_folder(tmp_path / "on-grey", part, card="card", ground="#eeeeec")  # type: ignore[arg-type]
    convert_model_folder(tmp_path / "on-grey", tmp_path / "small", dtype=torch.float16)
    assert read_ground(tmp_path / "on-grey") == read_ground(tmp_path / "small") == "#eeeeec"
    for ground in ("grey", "#eee", 7, ["#eeeeec"]):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"ground": ground}))
        with pytest.raises(InputError, match="#rrggbb"):
            read_ground(model)


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    module = KoDalle(CONFIGS["transformer"])  # type: ignore[arg-type]
    with torch.no_grad():
        next(module.parameters())[0] = 1e6  # float16 ends at 65,504
    source = tmp_path / "model"
    write_model_folder(source, {"transformer": Part(CONFIGS["transformer"], module.state_dict())}, card="card")
    with pytest.raises(InputError, match=r"transformer .*cannot hold its values, up to 1e\+06"):
        convert_model_folder(source, tmp_path / "small", dtype=torch.float16)
    with pytest.raises(InputError, match="is the model itself"):
        convert_model_folder(source, tmp_path / "x" / ".." / "model", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="no such folder"):
        convert_model_folder(tmp_path / "missing", tmp_path / "small", dtype=torch.float16)
    assert not (tmp_path / "small").exists()
    convert_model_folder(source, tmp_path / "small", dtype=torch.bfloat16)
    assert not (tmp_path / "small" / "tokenizer.json").exists()  # the source has none either
