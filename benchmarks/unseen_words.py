"""What a vocabulary does to words that no training caption has: unknown share, and held-out loss of captions with such words.

    python benchmarks/language_model_table.py runs/kiwi
    python benchmarks/unseen_words.py data/clothing64 --language-model runs/kiwi

KoDALLE's authors took a language model's vocabulary and tables because one made from the captions alone does not know 여친룩, OOTD,
쿨톤, 고급스러운. Compared here, on held-out pictures of the clothing set:

    captions, WordPiece    `train`: whole words and pieces of the training captions; what it lacks is [UNK]
    captions, BPE          `train-bpe`: letters and merges of them; what it lacks is bytes; also with dropout
    language model         Kiwi's 70,000 morphemes as WordPiece (benchmarks/language_model_table.py); its table as the start of
                           the text embeddings (256 wide, projected), and for comparison the same vectors dealt out at random

Each trains the model of configs/clothing/kodalle-bpe.yaml in small, for the same steps on the same pictures. Held-out captions come
as they are labelled, and with garments and colours in words that no training caption has (REWRITTEN, chosen before any of
these was trained). `kept` is what the loss shows of a caption's worth in those words: (without caption - rewritten) / (without - labelled).

Of the language model's entries those are trained that any of these captions needs, so that the table stays small: the tokens
are the same, and the text loss is the only thing that has fewer rivals. Runs lie in `--runs`, one a seed, and are read again.
Stores benchmarks/results/unseen_words/<pairs>.json after each run, prints a table and the document.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine_facts import REPOSITORY, print_document, stored_path
from safetensors.torch import load_file, save_file
from text_table import table
from tokenizers import Tokenizer
from training_minutes import stage_minutes

from engine.data.pairs import Pairs, load_image, load_pairs
from engine.data.tokenizer import (
    SPECIAL_TOKENS,
    CaptionTokenizer,
    load_tokenizer,
    train_bpe_tokenizer,
    train_tokenizer,
)
from engine.facts import facts
from engine.files import write_json
from engine.models.folder import Part, load_folder_tokenizer, load_part, read_part, write_model_folder
from engine.models.transformer import KoDalle

DOCUMENTS = ("여친룩", "OOTD", "쿨톤", "고급스러운")
REWRITTEN = {
    "그레이": "회색", "그린": "초록", "네이비": "남색", "라벤더": "연보라", "레드": "빨강", "민트": "옥색", "베이지": "연갈색",
    "브라운": "갈색", "블랙": "검정", "블루": "파랑", "스카이블루": "하늘색", "옐로우": "노랑", "오렌지": "주황", "와인": "자주",
    "카키": "국방색", "퍼플": "보라", "핑크": "분홍", "화이트": "하양",
    "셔츠": "남방", "스커트": "치마", "재킷": "자켓", "점퍼": "잠바", "티셔츠": "반팔티", "팬츠": "바지", "후드티": "후디",
}  # fmt: skip
SMALL = {
    "model.dim": 128, "model.num_layers": 3, "model.num_heads": 4, "model.text_seq_len": 44, "model.text_position_rows": 64,
    "augmented_views": 0, "augment_shift": 0, "data.flip": "false", "text.partial_captions": 0,
    "input_token_noise": 0.2, "deepspeed.train_micro_batch_size_per_gpu": 16, "loop.validation_batches": 4,
    "loop.sample_count": 2, "loop.torch_threads": 1,
}  # fmt: skip
OWN = {"text.lowercase": "false", "text.bpe_dropout": 0, "model.text_vocab_size": 400}
LANGUAGE_MODEL = {**OWN, "text.tokenizer": "{trimmed}", "model.text_embedding_dim": 256}
VARIANTS: dict[str, dict[str, object]] = {
    "captions, WordPiece": {**OWN, "text.tokenizer": "train", "text.vocab_size": 256},
    "language model": {**LANGUAGE_MODEL, "pretrained_text_embeddings": "{trimmed}"},
    "captions, BPE, dropout 0.1": {},
    "language model, vectors dealt out": {**LANGUAGE_MODEL, "pretrained_text_embeddings": "{dealt}"},
    "captions, BPE": {"text.bpe_dropout": 0},
}  # fmt: skip
_VALUE = re.compile(r"(?<=[은는] )([가-힣]+)(?=이다)")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument("--codec", type=Path, default=REPOSITORY / "models" / "clothing")
    parser.add_argument("--image-size", type=int, default=32, help="pixels that pictures are brought to; multiple of 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "unseen_words")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "unseen_words")
    arguments = parser.parse_args()
    pairs = load_pairs(arguments.pairs)
    held = [pair for pair in pairs.validation if rewritten(pair.captions[0]) != pair.captions[0]]
    captions = {
        "labelled": [pair.captions[0] for pair in held],
        "rewritten": [rewritten(pair.captions[0]) for pair in held],
        "without": [""] * len(held),
    }
    check_unseen(pairs, captions["rewritten"])
    document: Row = {
        "benchmark": "unseen_words", **facts(torch.device("cpu")),
        "config": {
            "pairs": stored_path(arguments.pairs), "image_size": arguments.image_size, "steps": arguments.steps,
            "seeds": arguments.seeds, "settings": SMALL, "held_out": len(held), "rewritten": REWRITTEN,
        },
        "vocabularies": vocabularies(pairs, captions, arguments.language_model), "trained": {},
    }  # fmt: skip
    codec = codec_for(arguments)
    trimmed = trim(arguments.language_model, pairs, captions, arguments.runs / "language-model")
    images = torch.from_numpy(np.stack([load_image(pair, arguments.image_size) for pair in held]))
    with torch.no_grad():
        tokens = load_part(codec, "vqgan").encode(images.permute(0, 3, 1, 2).float() / 255)
    for seed in arguments.seeds:
        for variant in arguments.variants:
            run = trained(arguments, variant, seed, codec, trimmed)
            row = {"seed": seed, **stage_minutes(run), **held_out_losses(run / "model", tokens, captions)}
            document["trained"].setdefault(variant, []).append(row)
            document["means"] = {name: mean(rows) for name, rows in document["trained"].items()}
            write_json(arguments.out / f"{arguments.pairs.name}.json", document)
    print(_tables(document))
    print_document(document)
    return 0


def rewritten(caption: str) -> str:
    """A caption with its values in the words of `REWRITTEN`."""
    return _VALUE.sub(lambda found: REWRITTEN.get(found[1], found[1]), caption)


def check_unseen(pairs: Pairs, captions: Sequence[str]) -> None:
    """Raises SystemExit where a training caption has one of the words after all."""
    seen = {word for pair in pairs.train for caption in pair.captions for word in _VALUE.findall(caption)}
    known = sorted(seen & set(REWRITTEN.values()))
    if known or not captions:
        raise SystemExit(f"{known or 'no caption'}: these words are no test")


def vocabularies(pairs: Pairs, captions: dict[str, list[str]], language_model: Path) -> dict[str, Row]:
    """Of each vocabulary its entries, and the share of words that it does not know."""
    of_training = [caption for pair in pairs.train for caption in pair.captions]
    found = {
        "captions, WordPiece": train_tokenizer(of_training, vocab_size=256),
        "captions, BPE": train_bpe_tokenizer(of_training, vocab_size=16_384, lowercase=True),
        "language model": load_tokenizer(str(language_model)),
    }
    rows: dict[str, Row] = {}
    for name, tokenizer in found.items():
        backend = Tokenizer.from_str(tokenizer.to_json())
        values = {
            "labelled": [word for caption in captions["labelled"] for word in _VALUE.findall(caption)],
            "rewritten": [word for caption in captions["rewritten"] for word in _VALUE.findall(caption)],
            "documents": list(DOCUMENTS),
        }
        rows[name] = {
            "entries": tokenizer.vocab_size,
            "pieces": {word: backend.encode(word).tokens[1:-1] for word in DOCUMENTS},
            "different_of_documents": len({tuple(backend.encode(word).ids) for word in DOCUMENTS}),
            "unknown_share": {kind: float(np.mean([_is_unknown(backend, word) for word in words]))
                              for kind, words in values.items()},
            "tokens_a_caption": {kind: float(np.mean([len(backend.encode(caption).ids) for caption in captions[kind]]))
                                 for kind in ("labelled", "rewritten")},
        }  # fmt: skip
    return rows


def _is_unknown(backend: Tokenizer, word: str) -> bool:
    return SPECIAL_TOKENS.index("[UNK]") in backend.encode(word).ids


def codec_for(arguments: argparse.Namespace) -> Path:
    """The codec at another image size: no weight of a convolutional one depends on it."""
    part, folder = read_part(arguments.codec, "vqgan"), arguments.runs / "codec"
    config = part.config.model_copy(update={"image_size": arguments.image_size})
    if not folder.is_dir():
        write_model_folder(folder, {"vqgan": Part(config, part.weights)}, card="")
    return Path(folder)


def trim(language_model: Path, pairs: Pairs, captions: dict[str, list[str]], folder: Path) -> Path:
    """The language model's folder with the entries that these captions need; tokens and vectors stay what they are."""
    if folder.is_dir():
        return folder
    whole = load_tokenizer(str(language_model))
    texts = [caption for pair in pairs.all for caption in pair.captions]
    texts += [*captions["labelled"], *captions["rewritten"], *DOCUMENTS, ""]
    tree = json.loads(whole.to_json())
    backend = Tokenizer.from_str(whole.to_json())
    used = {entry for text in set(texts) for entry in backend.encode(text).tokens} | set(SPECIAL_TOKENS)
    old: dict[str, int] = tree["model"]["vocab"]
    entries = sorted(used, key=lambda entry: old[entry])
    tree["model"]["vocab"] = {entry: number for number, entry in enumerate(entries)}
    trimmed = Tokenizer.from_str(json.dumps(tree))
    assert all(trimmed.encode(text).tokens == backend.encode(text).tokens for text in set(texts))
    folder.mkdir(parents=True)
    whole.with_backend(trimmed).save(folder)
    tables = load_file(language_model / "model.safetensors")
    rows = tables["embeddings.word_embeddings.weight"][[old[entry] for entry in entries]].clone()
    save_file({**tables, "embeddings.word_embeddings.weight": rows}, folder / "model.safetensors")
    return folder


def dealt_out(trimmed: Path) -> Path:
    """The trimmed folder with its vectors dealt out among the entries at random: the same numbers without their meaning."""
    folder = trimmed.with_name(f"{trimmed.name}-dealt-out")
    if not folder.is_dir():
        folder.mkdir()
        tables = load_file(trimmed / "model.safetensors")
        words = tables["embeddings.word_embeddings.weight"]
        places = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
        save_file({**tables, "embeddings.word_embeddings.weight": words[places].clone()}, folder / "model.safetensors")
    return Path(folder)


def trained(arguments: argparse.Namespace, variant: str, seed: int, codec: Path, trimmed: Path) -> Path:
    """The run of a variant; trains it if it has not ended."""
    run: Path = arguments.runs / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', variant)}-{seed}"
    if not (run / "model").is_dir():
        settings = SMALL | VARIANTS[variant] | {
            "run": run, "seed": seed, "data.pairs": arguments.pairs, "vqgan": codec, "loop.steps": arguments.steps,
            "model.image_grid_size": load_part(codec, "vqgan").config.grid_size,
            "loop.validate_every": arguments.steps, "loop.sample_every": arguments.steps,
            "loop.checkpoint_every": arguments.steps,
        }  # fmt: skip
        if "{trimmed}" in settings.values():
            settings["model.text_vocab_size"] = load_tokenizer(str(trimmed)).vocab_size
        folders = {"{trimmed}": trimmed, "{dealt}": dealt_out(trimmed)}
        values = [f"{name}={folders.get(str(value), value)}" for name, value in settings.items()]
        config = REPOSITORY / "configs" / "clothing" / "kodalle-bpe.yaml"
        command = [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(config), *values]
        subprocess.run(command, cwd=REPOSITORY, env={"DS_ACCELERATOR": "cpu"} | dict(os.environ), check=True)
    return run


@torch.no_grad()
def held_out_losses(folder: Path, image_tokens: torch.Tensor, captions: dict[str, list[str]]) -> Row:
    """Mean loss of the image tokens in nats for each kind of captions, and what is kept of a caption's worth."""
    model: KoDalle = load_part(folder, "transformer")
    tokenizer = load_folder_tokenizer(folder)
    losses = {kind: image_losses(model, tokenizer, texts, image_tokens) for kind, texts in captions.items()}
    worth, kept = losses["without"] - losses["labelled"], losses["without"] - losses["rewritten"]
    error = float((losses["rewritten"] - losses["labelled"]).std() / len(worth) ** 0.5)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss_image": {kind: float(values.mean()) for kind, values in losses.items()},
        "rewritten_minus_labelled": {"mean": float((losses["rewritten"] - losses["labelled"]).mean()), "standard_error": error},
        "kept": float(kept.mean() / worth.mean()),
    }  # fmt: skip


def mean(rows: Sequence[Row]) -> Row:
    """Of a variant's seeds: mean losses, and what is kept of a caption's worth by each and by all of them."""
    losses = {kind: statistics.mean(row["loss_image"][kind] for row in rows) for kind in rows[0]["loss_image"]}
    worth, kept = losses["without"] - losses["labelled"], losses["without"] - losses["rewritten"]
    return {"loss_image": losses, "kept": kept / worth, "kept_by_seed": [row["kept"] for row in rows]}


def image_losses(
    model: KoDalle, tokenizer: CaptionTokenizer, captions: Sequence[str], image_tokens: torch.Tensor
) -> torch.Tensor:
    """Mean loss of the image tokens (N, S) in nats for each of N captions, (N,)."""
    found = []
    for start in range(0, len(captions), 32):
        images = image_tokens[start : start + 32]
        texts = tokenizer.encode(captions[start : start + 32], model.config.text_seq_len).tokens
        _, logits = model.logits(model.text_embedding.numbered(texts), images)
        found.append(F.cross_entropy(logits.transpose(1, 2), images, reduction="none").mean(1))
    return torch.cat(found)


def _tables(document: Row) -> str:
    known = [
        [name, f"{row['entries']:,}", *(f"{100 * row['unknown_share'][kind]:.0f} %" for kind in row["unknown_share"]),
         f"{row['different_of_documents']} of {len(DOCUMENTS)}"]
        for name, row in document["vocabularies"].items()
    ]  # fmt: skip
    losses = [
        [name, *(f"{value:.3f}" for value in row["loss_image"].values()), f"{100 * row['kept']:.0f} %",
         " / ".join(f"{100 * kept:.0f} %" for kept in row["kept_by_seed"])]
        for name, row in document["means"].items()
    ]  # fmt: skip
    header = ["vocabulary", "entries", "labelled", "rewritten", "documents'", "distinct"]
    first = table("unknown share of words", header, known)
    return (
        first
        + "\n\n"
        + table("held-out loss", ["trained", "labelled", "rewritten", "without", "kept", "by seed"], losses)
    )


if __name__ == "__main__":
    sys.exit(main())
