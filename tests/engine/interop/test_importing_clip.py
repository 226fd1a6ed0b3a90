"""Hugging Face folders of CLIPModels: the same scores as transformers' own classes, in pipelines too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config.ranker import ClipConfig
from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError
from engine.interop.importing import import_checkpoint
from engine.models.clip import Clip
from engine.models.folder import load_part, load_ranker_tokenizer
from engine.models.transformer import KoDalle
from engine.pipeline.pipeline import Pipeline
from tests.engine.interop.test_importing_codecs import DISCRETE, _codec

WORDS = ["<start>", "<end>", "a", "red", "blue", "shirt", "coat"]
TEXT = {
    "vocab_size": 9, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
CAPTIONS = ["a red shirt", "a blue coat", "red", "a red red red red red shirt coat coat"]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="a"
    )


def _clip_folder(folder: Path, **text: Any) -> CLIPModel:
    torch.manual_seed(2)
    model = CLIPModel(CLIPConfig(text_config=TEXT | text, vision_config=VISION, projection_dim=12)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    return model


def _images(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def _scores(model: CLIPModel, images: Tensor, ids: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    found = model(input_ids=ids, pixel_values=(images - mean) / std)
    return found.logits_per_text / model.logit_scale.exp()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_scores_are_transformers_own(file: str, tmp_path: Path) -> None:
    original = _clip_folder(tmp_path / "clip")
    if file == "pytorch_model.bin":
        (tmp_path / "clip" / "model.safetensors").unlink()
        older = original.state_dict() | {"text_model.embeddings.position_ids": torch.arange(8)[None]}
        torch.save(older, tmp_path / "clip" / file)
    found = import_checkpoint(tmp_path / "clip", tmp_path / "model")
    assert found.kind == "clip"
    clip, tokenizer = load_part(tmp_path / "model", "koclip"), load_ranker_tokenizer(tmp_path / "model")
    assert isinstance(clip, Clip)
    assert clip.config == ClipConfig(
        image_size=32, patch_size=8, image_dim=24, image_layers=2, image_heads=3, image_ff_dim=32, text_vocab_size=9,
        text_seq_len=8, text_dim=16, text_layers=2, text_heads=2, text_ff_dim=24, end_token=1, embed_dim=12,
        image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    tokens = tokenizer.encode(CAPTIONS, 8).tokens
    assert tokens[2].tolist() == [0, 3, 1, 1, 1, 1, 1, 1]
    assert tokens[3, -1] == 1  # cut, and ended all the same
    expected = _scores(original, _images(), tokens)
    assert expected.std() > 0.1
    images, texts = clip.embed_images(_images()), clip.embed_texts(tokens)
    assert (clip.scores(images, texts) - expected).abs().max() <= 1e-5
    encoder = KoclipEncoder(clip)  # one caption at a time, up to its end token
    assert (clip.scores(encoder.embed_images(_images()), encoder.embed_texts(tokens)) - expected).abs().max() <= 1e-5


def test_the_oldest_configs_end_where_the_highest_token_is(tmp_path: Path) -> None:
    """OpenAI's published folders say that token 2 ends a caption; transformers takes the highest token's place instead."""
    original = _clip_folder(tmp_path / "clip", eos_token_id=2)
    import_checkpoint(tmp_path / "clip", tmp_path / "model")
    clip: Clip = load_part(tmp_path / "model", "koclip")
    tokens = torch.tensor([[0, 3, 4, 8, 0, 0, 0, 0], [0, 5, 8, 0, 0, 0, 0, 0]])
    expected = _scores(original, _images(), tokens)
    assert (
        clip.scores(clip.embed_images(_images()), KoclipEncoder(clip).embed_texts(tokens)) - expected
    ).abs().max() <= 1e-5


def test_images_are_resized_and_cropped_as_clip_does() -> None:
    """The middle square of the shorter side at 32 pixels: what is left and right of it does not count."""
    clip = Clip(
        ClipConfig(
            image_size=32,
            patch_size=8,
            image_dim=24,
            image_layers=1,
            image_heads=3,
            image_ff_dim=32,
            text_vocab_size=9,
            text_layers=1,
        )
    )
    wide = torch.rand(1, 3, 64, 160)
    changed = wide.clone()
    changed[..., :40] = 0
    changed[..., -40:] = 1
    assert clip.prepare(wide).shape == (1, 3, 32, 32)
    torch.testing.assert_close(clip.prepare(wide), clip.prepare(changed))
    assert torch.equal(clip.prepare(_images()), clip.prepare(_images(32)))


def test_a_pipeline_ranks_with_a_clip_and_decodes_with_any_codec(tmp_path: Path) -> None:
    """DiscreteVAE for images, CLIP with its own tokenizer for scores; saved and loaded they are the same."""
    original = _clip_folder(tmp_path / "clip")
    import_checkpoint(tmp_path / "clip", tmp_path / "ranker")
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=60)
    torch.manual_seed(6)
    transformer = KoDalle(
        TransformerConfig(
            text_vocab_size=60,
            text_seq_len=8,
            image_vocab_size=30,
            image_grid_size=8,
            dim=32,
            num_layers=2,
            num_heads=2,
            head_dim=16,
            text_position_rows=10,
        )
    )
    clip, own = load_part(tmp_path / "ranker", "koclip"), load_ranker_tokenizer(tmp_path / "ranker")
    pipeline = Pipeline(transformer, _codec(DISCRETE), clip, tokenizer, ranker_tokenizer=own)
    generation = pipeline(["a blue coat"], candidates=3, seed=1)[0]
    pixels = torch.stack([torch.from_numpy(_pixels(candidate.image)) for candidate in generation.candidates])
    expected = _scores(original, pixels, own.encode(["a blue coat"], 8).tokens)[0]
    assert [candidate.score for candidate in generation.candidates] == pytest.approx(
        expected.tolist(), abs=5e-3
    )  # 8 bits
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)(["a blue coat"], candidates=3, seed=1)[0]
    assert [candidate.score for candidate in again.candidates] == [
        candidate.score for candidate in generation.candidates
    ]


def _pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


def test_faults(tmp_path: Path) -> None:
    _clip_folder(tmp_path / "clip")
    with pytest.raises(InputError, match=r"--kind: koclip: .* holds a CLIPModel: write clip, or auto"):
        import_checkpoint(tmp_path / "clip", tmp_path / "model", kind="koclip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 48
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers.0.mlp.fc1.bias: \[24\]: .* require \[48\]"):
        import_checkpoint(tmp_path / "clip", tmp_path / "model")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        import_checkpoint(tmp_path / "clip", tmp_path / "model")
