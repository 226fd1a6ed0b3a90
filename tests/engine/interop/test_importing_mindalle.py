"""minDALL-E: text to image, classes and unconditional, against its arithmetic written a second time; archives and folders."""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.codec import VqganConfig
from engine.data.class_tokenizer import class_tokenizer, unconditional_tokenizer
from engine.data.tokenizer import load_tokenizer
from engine.decoding.sampler import Sampler
from engine.errors import InputError
from engine.interop.importing import Kind, import_checkpoint
from engine.models.folder import load_folder_tokenizer, load_part
from engine.models.folder_config import read_generation
from engine.models.vqgan import Vqgan
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.forked import run_forked

DIM, LAYERS, HEADS, T, WORDS, CODES, GRID = 24, 2, 3, 6, 40, 30, 4
CODEC = VqganConfig(
    image_size=32, base_channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    latent_channels=12, embed_dim=10, codebook_size=CODES,
)  # fmt: skip
VOCABULARY = {"[UNK]": 0, "[PAD]": 1, "a": 2, "b": 3, "c</w>": 4, "b</w>": 5, "ab</w>": 6, "ab": 7, "d</w>": 8}
PROMPTS = ["ab", "AB c", "", "abc zz", "a b c d a b c d"]
KINDS = ["text", "class", "nothing"]


def weights_of(kind: str, *, bias: bool = True) -> dict[str, Tensor]:
    """A transformer of minDALL-E, under its names."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"tok_emb_img.weight": (CODES, DIM), "pos_emb_img.weight": (GRID * GRID, DIM)}
    shapes |= {"ln_f.weight": (DIM,), "ln_f.bias": (DIM,)}
    if kind == "text":
        shapes |= {"tok_emb_txt.weight": (WORDS, DIM), "pos_emb_txt.weight": (T, DIM)}
        shapes |= {"head_txt.weight": (WORDS, DIM), "head_img.weight": (CODES, DIM)}
    else:
        shapes |= {"head.weight": (CODES, DIM)} | (
            {"sos.weight": (5, DIM)} if kind == "class" else {"sos": (1, 1, DIM)}
        )
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        shapes |= {f"{block}ln{n}.{part}": (DIM,) for n in (1, 2) for part in ("weight", "bias")}
        for part, size in (("attn.key", (DIM, DIM)), ("attn.query", (DIM, DIM)), ("attn.value", (DIM, DIM)),
                           ("attn.proj", (DIM, DIM)), ("mlp.0", (4 * DIM, DIM)), ("mlp.2", (DIM, 4 * DIM))):  # fmt: skip
            shapes |= {f"{block}{part}.weight": size} | ({f"{block}{part}.bias": size[:1]} if bias else {})
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def plain_logits(weights: dict[str, Tensor], text: Tensor, image: Tensor, *, approximate: bool = False) -> Tensor:
    """What the original computes of the image: (B, N, CODES)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    cells = weights["tok_emb_img.weight"][image[:, :-1]] + weights["pos_emb_img.weight"][: image.shape[1] - 1]
    if "tok_emb_txt.weight" in weights:
        start = weights["tok_emb_txt.weight"][text] + weights["pos_emb_txt.weight"]
    else:
        start = weights["sos.weight"][text] if "sos.weight" in weights else weights["sos"].expand(len(text), 1, DIM)
    x = torch.cat([start, cells], 1)
    B, length, _ = x.shape
    for layer in range(LAYERS):
        normed = norm(x, f"blocks.{layer}.ln1")
        q, k, v = (
            linear(normed, f"blocks.{layer}.attn.{part}").view(B, length, HEADS, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(DIM // HEADS)
        scores = scores.masked_fill(torch.ones(length, length).tril() == 0, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blocks.{layer}.attn.proj")
        grown = linear(norm(x, f"blocks.{layer}.ln2"), f"blocks.{layer}.mlp.0")
        grown = grown * torch.sigmoid(1.702 * grown) if approximate else F.gelu(grown)
        x = x + linear(grown, f"blocks.{layer}.mlp.2")
    head = weights["head_img.weight"] if "head_img.weight" in weights else weights["head.weight"]
    return norm(x, "ln_f")[:, start.shape[1] - 1 :] @ head.T


def write(folder: Path, kind: str, *, weights: dict[str, Tensor] | None = None, **hparams: Any) -> Path:
    """A model's folder; of transfer learning one file with both stages."""
    folder.mkdir(parents=True)
    torch.manual_seed(4)
    codec = Vqgan(CODEC).state_dict()
    weights = weights_of(kind) if weights is None else weights
    stage = {
        "n_embed": CODES,
        "embed_dim": 10,
        "hparams": {"ch": 32, "z_channels": 12, "resolution": 32, "ch_mult": [1] * 4},
    }
    hparams = {"embed_dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "ctx_len_img": GRID * GRID} | hparams
    tree = {"stage1": stage, "stage2": {"vocab_size_img": CODES, "hparams": hparams}}
    (folder / "any-name.yaml").write_text(json.dumps(tree), encoding="utf-8")
    if kind != "text":
        both = {f"stage1.{name}": value for name, value in codec.items()}
        torch.save(
            {"state_dict": both | {f"stage2.{name}": value for name, value in weights.items()}}, folder / "last.ckpt"
        )
        return folder
    torch.save({"state_dict": codec}, folder / "one.bin")
    torch.save({"state_dict": weights}, folder / "two.bin")
    (folder / "words").mkdir()
    (folder / "words" / "v.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    (folder / "words" / "m.txt").write_text("#version: 0.2\na b\na b</w>\n", encoding="utf-8")
    return folder


def prompts_of(kind: str) -> Tensor:
    return torch.tensor(
        {"text": [[5, 4, 3, 1, 1, 1], [2, 2, 7, 6, 9, 39]], "class": [[4], [0]], "nothing": [[0], [0]]}[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_computed(kind: str, tmp_path: Path) -> None:
    found = import_checkpoint(write(tmp_path / "theirs", kind), tmp_path / "ours", kind="mindalle")
    assert found.kind == "mindalle"
    model = load_part(tmp_path / "ours", "transformer")
    text, image = prompts_of(kind), torch.randint(CODES, (2, GRID * GRID), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text_logits, logits = model.logits(text, image)
        losses = model(text, image)
    torch.testing.assert_close(logits, plain_logits(weights_of(kind), text, image), rtol=0, atol=1e-5)
    loss_image = F.cross_entropy(logits.flatten(0, 1), image.flatten())
    if kind == "text":
        assert text_logits.shape == (2, T - 1, WORDS)
        loss_text = F.cross_entropy(text_logits.flatten(0, 1), text[:, 1:].flatten())
        torch.testing.assert_close(losses.loss, (loss_text + 7 * loss_image) / 8)
    else:
        torch.testing.assert_close(losses.loss, loss_image)
        assert (text_logits.numel(), float(losses.loss_text)) == (0, 0.0)
    assert read_generation(tmp_path / "ours").top_k == 256


@pytest.mark.parametrize("case", ["approximate", "without biases"])
def test_other_switches_are_read(case: str, tmp_path: Path) -> None:
    weights = weights_of("text", bias=case != "without biases")
    options = {"gelu_use_approx": True} if case == "approximate" else {"attn_bias": False, "mlp_bias": False}
    import_checkpoint(write(tmp_path / "theirs", "text", weights=weights, **options), tmp_path / "ours")
    model = load_part(tmp_path / "ours", "transformer")
    text, image = prompts_of("text"), torch.arange(2 * GRID * GRID).view(2, -1) % CODES
    expected = plain_logits(weights, text, image, approximate=case == "approximate")
    with torch.no_grad():
        torch.testing.assert_close(model.logits(text, image)[1], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("inside", [True, False])
def test_an_archive_is_its_folder(mode: Any, inside: bool, tmp_path: Path) -> None:
    """With a folder at its top or without, as a file or alone in a folder beside other files; nothing of it is left."""
    folder = write(tmp_path / "theirs", "text")
    (tmp_path / "down").mkdir()
    with tarfile.open(tmp_path / "down" / "any.name", mode) as archive:
        archive.add(folder, arcname="1.3B" if inside else ".")
    (tmp_path / "down" / "README.md").write_text("what it is", encoding="utf-8")
    import_checkpoint(folder, tmp_path / "of folder")
    for number, source in enumerate((tmp_path / "down" / "any.name", tmp_path / "down")):
        import_checkpoint(source, tmp_path / str(number))
        for file in (tmp_path / "of folder").iterdir():
            if file.name != "model_card.md":
                assert (tmp_path / str(number) / file.name).read_bytes() == file.read_bytes(), file.name
    assert "any.name" in (tmp_path / "0" / "model_card.md").read_text(encoding="utf-8")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_prompts_become_the_originals_tokens(tmp_path: Path) -> None:
    """Lower case, byte pairs, [UNK] for what is unknown, cut at the end and filled up with [PAD], no special tokens."""
    import_checkpoint(write(tmp_path / "theirs", "text"), tmp_path / "ours")
    tokens = load_folder_tokenizer(tmp_path / "ours").encode(PROMPTS, T)
    assert tokens.tokens.tolist() == [
        [6, 1, 1, 1, 1, 1], [6, 4, 1, 1, 1, 1], [1] * 6, [7, 4, 0, 0, 1, 1], [0, 5, 4, 8, 0, 5]
    ]  # fmt: skip
    assert tokens.cut == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_out(kind: str, tmp_path: Path) -> None:
    import_checkpoint(write(tmp_path / "theirs", kind), tmp_path / "ours")
    pipeline = Pipeline.from_pretrained(tmp_path / "ours")
    caption = "4" if kind == "class" else "a b c"
    params = SamplingParams(candidates=2, seed=5, temperature=0)
    generation = pipeline([caption], params)[0]
    text = pipeline.tokenizer.encode([caption], pipeline.transformer.config.text_seq_len).tokens
    assert generation.top(1)[0].image.size == (32, 32)
    greedy = Sampler(pipeline.transformer, weights="plain").generate(text, [SequenceRequest(0, params)])
    weights, so_far = weights_of(kind), torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(GRID * GRID):
        logits = plain_logits(weights, text, F.pad(so_far, (0, 1)))
        so_far = torch.cat([so_far, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, so_far)


def test_classes_are_named_and_have_no_empty_caption(tmp_path: Path) -> None:
    import_checkpoint(write(tmp_path / "theirs", "class"), tmp_path / "ours")
    pipeline = Pipeline.from_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=r"caption: 'cat': is none of the model's 5 classes: 0, 1, 2, 3, 4"):
        pipeline(["cat"])
    with pytest.raises(InputError, match="needs an empty caption, which this model has none of"):
        pipeline(["3"], SamplingParams(guidance_scale=3.0))


def test_any_caption_is_the_same_to_an_unconditional_model() -> None:
    assert unconditional_tokenizer().encode(["", "a", "b c"], 1).tokens.tolist() == [[0], [0], [0]]


def test_class_names_survive_a_folder(tmp_path: Path) -> None:
    names = ["red shirt", "10", "1", "빨간 셔츠", "[UNK]"]
    class_tokenizer(names).save(tmp_path)
    read = load_tokenizer(str(tmp_path))
    assert read.encode([f" {name} " for name in names], 1).tokens[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="is none of the model's 5 classes"):
        read.encode(["0"], 1)
    with pytest.raises(InputError, match="there twice"):
        class_tokenizer(["a", "a "])


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights_of("text").items() if key != name}


@pytest.mark.parametrize(
    ("weights", "hparams", "message"),
    [
        (None, {"n_heads": 5}, "n_heads: 5: does not divide the width 24"),
        (None, {"n_layers": 3}, "n_layers: 3: its tensors say 2"),
        (None, {"n_heads": "three"}, "n_heads: three: must be a positive integer"),
        (_without("blocks.1.mlp.2.weight"), {}, "layers.1.feed_forward.shrink.weight: missing"),
        (_without("blocks.1.attn.value.bias"), {}, "attn.key.bias.*is a tensor that this kind of model does not have"),
        (_without("head_txt.weight"), {}, r"head.weight: missing|head_img.weight.*does not have"),
        (weights_of("text") | {"pos_emb_img.weight": torch.zeros(15, DIM)}, {"ctx_len_img": 15}, "no square grid"),
        (weights_of("text") | {"blocks.0.ln1.bias": torch.zeros(7)}, {}, r"layers.0.attention.norm.bias: \[7\]"),
        (weights_of("text") | {"tok_emb_img.weight": torch.zeros(31, DIM)}, {}, "its tensors say 31"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    weights: dict[str, Tensor] | None, hparams: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        import_checkpoint(write(tmp_path / "theirs", "text", weights=weights, **hparams), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


_NESTED = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("any-name.yaml", f"a: &a [x, x]\n{_NESTED}stage2: {{hparams: {{n_heads: *i}}}}", "has no yaml|n_heads"),
        ("any-name.yaml", 'stage2: !!python/object/apply:os.system ["touch run-by-yaml"]', "has no yaml"),
        ("any-name.yaml", f"stage2: {'[' * 5000}{']' * 5000}", "has no yaml"),
        ("any-name.yaml", json.dumps({"stage2": {"hparams": {"n_heads": [1]}}}), r"n_heads: \[1\]: must be a positive"),
        (
            "any-name.yaml",
            '{"stage1": {"hparams": {"ch_mult": 3}}, "stage2": {"hparams": {"n_heads": 3}}}',
            "ch_mult: 3",
        ),
        (
            "words/v.json",
            json.dumps(VOCABULARY | {"x": 1 << 40}),
            "numbers entries up to 1099511627776, its model has 40",
        ),
        ("words/v.json", json.dumps(VOCABULARY | {"x": -5}), "has an entry twice, or no"),
        ("words/v.json", json.dumps(VOCABULARY | {"x": 3}), "has an entry twice, or no"),
        ("words/v.json", json.dumps({"a": 0, "b": 1, "ab": 2}), "has an entry twice, or no"),
        ("words/m.txt", "a b c d\n", "has a line that is no pair"),
        ("words/m.txt", "q w\n", "joins 'q', which v.json does not have"),
    ],
)
def test_hostile_files_beside_the_weights_are_refused(file: str, text: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "text")
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not Path("run-by-yaml").exists()


def test_a_checkpoint_without_its_yaml_or_codec_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", "class")
    (folder / "any-name.yaml").rename(tmp_path / "kept.yaml")
    with pytest.raises(InputError, match="has no yaml with a section stage2 beside it"):
        import_checkpoint(folder / "last.ckpt", tmp_path / "ours")
    (tmp_path / "other.yaml").write_text("model: {}", encoding="utf-8")
    alone = write(tmp_path / "alone", "text")
    (alone / "one.bin").unlink()
    with pytest.raises(InputError, match="has no codec in it and none beside it"):
        import_checkpoint(alone, tmp_path / "ours")


@pytest.mark.parametrize("kind", ["kodalle", "clip"])
def test_kind_is_what_it_must_be(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a minDALL-E: write mindalle, or auto"):
        import_checkpoint(write(tmp_path / "theirs", "nothing"), tmp_path / "ours", kind=kind)


_WIDE, _DEEP = 256, 24
_MEGABYTE = 1 << 20


def _import_in_little_memory(small: Path, source: Path, destination: Path) -> None:
    """Prints what the second import took beyond what the process had after the first."""
    import_checkpoint(small, destination)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    before = _peak_bytes()
    import_checkpoint(source, destination)
    print(_peak_bytes() - before)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.slow
def test_a_checkpoint_streams_tensor_by_tensor(tmp_path: Path) -> None:
    """minDALL-E's text vocabulary at a sixth of its width: 110 MB, in the memory of its joined heads and their parts.

    benchmarks/import_cost.py does the same with all 1.3 billion parameters.
    """
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (16384, _WIDE) for name in ("tok_emb_txt", "tok_emb_img", "head_txt")
    }
    shapes |= {
        "head_img.weight": (CODES, _WIDE),
        "tok_emb_img.weight": (CODES, _WIDE),
        "pos_emb_txt.weight": (64, _WIDE),
    }
    shapes |= {"pos_emb_img.weight": (GRID * GRID, _WIDE), "ln_f.weight": (_WIDE,), "ln_f.bias": (_WIDE,)}
    for layer in range(_DEEP):
        for name, value in weights_of("text").items():
            if name.startswith("blocks.0."):
                wide = tuple(size // DIM * _WIDE for size in value.shape)
                shapes[name.replace("blocks.0.", f"blocks.{layer}.")] = wide
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    total, largest = (pick(4 * value.numel() for value in weights.values()) for pick in (sum, max))
    sizes = {"embed_dim": _WIDE, "n_layers": _DEEP, "n_heads": 8}
    write(tmp_path / "theirs", "text", weights=weights, **sizes)
    del weights
    small = write(tmp_path / "small", "text")
    job = (_import_in_little_memory, (small, tmp_path / "theirs", tmp_path / "ours"))
    ((code, printed),) = run_forked([job], tmp_path, preload=["engine.interop.importing"])
    assert code == 0, printed
    assert (tmp_path / "ours" / "transformer.safetensors").stat().st_size >= total
    assert int(printed.split()[-1]) < 2 * largest + 16 * _MEGABYTE < total / 2
