"""Compares imported checkpoints with what the original code computed from them: python benchmarks/parity.py FOLDER [--out DIR]

FOLDER holds a folder a checkpoint, each with `expected.safetensors`: inputs, and the original's outputs. Each is imported and
computes the same. A row says how far the largest value is off, whether tokens are equal, or why the checkpoint is refused. The last
line is one JSON document; the exit code is 1 where tokens differ.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document
from safetensors.torch import load_file
from torch import Tensor

from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.decoding.sampler import Sampler
from engine.errors import InputError
from engine.facts import facts
from engine.files import write_json
from engine.interop.importing import ImportOptions, import_checkpoint
from engine.models.folder import load_folder_tokenizer, load_part
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.sampling_params import SamplingParams, SequenceRequest

Expected = dict[str, Tensor]
Row = dict[str, Any]
_SWITCHES = (
    "unique_padding", "reversible", "sandwich_norm", "stable", "token_shift", "rotary", "attention_patterns", "condition", "bos",
    "image_positions", "qkv_bias", "activation", "layer_scale", "separate_heads",
)  # fmt: skip
_PRIMED = 0.4375  # of the image tokens, as DALLE-pytorch
_LOSS_WEIGHTS = (7.0, 5.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON document")
    arguments = parser.parse_args()
    rows = []
    for folder in sorted(path for path in arguments.folder.iterdir() if (path / "expected.safetensors").is_file()):
        row = {"checkpoint": folder.name, **compare(folder)}
        rows.append(row)
        print(
            "  ".join(
                f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    document = {"benchmark": "parity", **facts(torch.device("cpu")), "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "parity.json", document)
    print_document(document)
    return 0 if all(row.get("tokens_equal", True) and row.get("prompt_tokens_equal", True) for row in rows) else 1


@torch.no_grad()
def compare(folder: Path) -> Row:
    """What a checkpoint is, and how far from the original: largest differences, in units of the largest value if that exceeds 1."""
    expected = load_file(folder / "expected.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        try:
            found = import_checkpoint(folder, model, options=_options(folder, expected))
        except InputError as error:
            return {"refused": str(error).replace(str(folder), folder.name)}
        row: Row = {"kind": found.kind}
        if "transformer" in found.parts:
            config = found.parts["transformer"].config
            assert isinstance(config, TransformerConfig)
            defaults = TransformerConfig()
            row["switches"] = [name for name in _SWITCHES if getattr(config, name) != getattr(defaults, name)]
            networks = load_part(model, "transformer"), load_part(model, "vqgan")
            compared = _mindalle if found.kind == "mindalle" else _transformer
            row |= compared(*networks, expected)
            if "prompt_tokens" in expected:
                prompts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["prompts"]
                encoded = load_folder_tokenizer(model).encode(prompts, config.text_seq_len)
                row["prompt_tokens_equal"] = torch.equal(encoded.tokens, expected["prompt_tokens"])
        elif "vqgan" in found.parts:
            row |= _codec(load_part(model, "vqgan"), expected)
        else:
            row |= _ranker(load_part(model, "koclip"), expected)
        return row


def _options(folder: Path, expected: Expected) -> ImportOptions:
    """OpenAI's files alone do not state the images' size: that of the expected ones."""
    alone = not any(folder.glob("*.yaml")) and "reconstruction_stats" in expected
    return ImportOptions(image_size=expected["image_u8"].shape[-1] if alone else None)


def _codec(codec: ImageCodec, expected: Expected) -> Row:
    images = _images(expected["image_u8"], codec.config.image_size)
    row: Row = {"tokens_equal": torch.equal(codec.encode(images), expected["codes"])}
    if "logits" in expected and not isinstance(codec, Vqgan):
        row["code_scores"] = _distance(codec.encode_logits(images), expected["logits"])
    step = codec.config.image_size // expected["reconstruction"].shape[-1]
    distances = []
    for tokens, raw in (("codes", "reconstruction"), ("random_codes", "decoded_random_codes")):
        # OpenAI's are images; the others are what comes before the last mapping.
        wanted = expected[raw] if "reconstruction_stats" in expected else codec.to_images(expected[raw])
        distances.append(_distance(codec.decode(expected[tokens])[:, :, ::step, ::step], wanted))
    return row | {"pixels": max(distances)}


def _ranker(koclip: KoClip, expected: Expected) -> Row:
    config: KoclipConfig = koclip.config
    served = KoClip(config.model_copy(update={"pixels": "served"})).eval()
    served.load_state_dict(koclip.state_dict())
    texts = koclip.embed_texts(expected["text"])
    embeddings, scores = [_distance(texts, expected["text_embeddings"])], []
    for model, prefix, size in ((koclip, "", 224), (served, "served_", 256)):
        images = model.embed_images(_images(expected[f"{prefix}image_u8"], size))
        embeddings.append(_distance(images, expected[f"{prefix}image_embeddings"]))
        scores.append(_distance(texts @ images.T, expected[f"{prefix}scores"]))
    return {"head": config.head, "embeddings": max(embeddings), "scores": max(scores)}


def _transformer(model: KoDalle, codec: ImageCodec, expected: Expected) -> Row:
    text, tokens = expected["text"], expected["image_tokens"]
    text_logits, image_logits = model.logits(text, tokens)
    logits = [_distance(text_logits, expected["logits_text"]), _distance(image_logits, expected["logits_image"])]
    if "logits_image_null" in expected:  # the empty caption of guidance
        null = model.logits(torch.zeros_like(text[:1]), tokens[:1])[1]
        logits.append(_distance(null, expected["logits_image_null"]))
    losses = min(  # the weight of the image's loss is no part of a model
        max(_distance(getattr(found, name), expected[name]) for name in ("loss", "loss_text", "loss_image"))
        for found in (model(text, tokens, loss_image_weight=weight) for weight in _LOSS_WEIGHTS)
    )
    row: Row = {"logits": max(logits), "losses": losses}
    equal = True
    # The picture that greedy decoding continues: its codes, where the codec's tensors are no weights.
    first = next((value for name, value in expected.items() if name.startswith("given")), None)
    if "encoded" in expected:
        first = codec.encode(_images(expected["image_u8"], codec.config.image_size))
        equal = torch.equal(first, expected["encoded"])
        if "decoded" in expected:
            row["pixels"] = _distance(codec.decode(tokens)[:, :, ::4, ::4], codec.to_images(expected["decoded"]))
        else:
            row["pixels"] = _distance(codec.decode(tokens)[:, :, ::8, ::8], expected["decoded_every_8th"])
    assert first is not None
    requests = [SequenceRequest(0, SamplingParams(temperature=0))]
    init_tokens = first[:1, : int(_PRIMED * tokens.shape[1])]
    for speculative in (False, True):
        sampler = Sampler(model, speculative=speculative)
        equal &= torch.equal(sampler.generate(text[:1], requests), expected["greedy"])
        primed = sampler.generate(text[:1], requests, init_tokens=init_tokens)
        equal &= torch.equal(primed, expected["greedy_primed"])
    return row | {"tokens_equal": equal}


def _mindalle(model: KoDalle, codec: ImageCodec, expected: Expected) -> Row:
    tokens = expected["image_tokens"]
    text = expected.get("text", expected.get("labels", torch.zeros(len(tokens), dtype=torch.int64)))
    text = text.view(len(tokens), -1)
    text_logits, image_logits = model.logits(text, tokens)
    logits = [_distance(image_logits, expected["logits_image" if "logits_image" in expected else "logits"])]
    if "logits_text" in expected:
        logits.append(_distance(text_logits, expected["logits_text"]))
    row: Row = {"logits": max(logits)}
    equal = True
    if "encoded" in expected:
        equal = torch.equal(codec.encode(_images(expected["image_u8"], codec.config.image_size)), expected["encoded"])
        row["pixels"] = _distance(codec.decode(tokens)[:, :, ::4, ::4], expected["decoded_every_4th"])
    first = expected["greedy_label"][None] if "greedy_label" in expected else text[:1]
    for speculative in (False, True):
        sampler = Sampler(model, speculative=speculative)
        equal &= torch.equal(
            sampler.generate(first, [SequenceRequest(0, SamplingParams(temperature=0))]), expected["greedy"]
        )
    return row | {"tokens_equal": equal}


def _images(pixels: Tensor, size: int) -> Tensor:
    """uint8 of fewer pixels -> float in [0, 1], each pixel repeated."""
    times = size // pixels.shape[-1]
    return pixels.repeat_interleave(times, -1).repeat_interleave(times, -2).float() / 255


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"{tuple(found.shape)} instead of {tuple(expected.shape)}")
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


if __name__ == "__main__":
    raise SystemExit(main())
