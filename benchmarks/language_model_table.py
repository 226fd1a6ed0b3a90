"""A language model's vocabulary and its table of vectors, as a folder that `text.tokenizer` and `pretrained_text_embeddings` read.

    pip install kiwipiepy==0.24.1 kiwipiepy-model==0.24.0
    python benchmarks/language_model_table.py runs/kiwi

The tables of klue/roberta-large and of KoGPT lie on a hub. This one lies in a package: the morphemes of Kiwi (bab2min/Kiwi, Apache-2.0),
whose model `cong` was trained on Korean texts and has a vector of 256 numbers for each. Kiwi gives the cosine of two vectors and
not the vectors, so they are restored from the cosines with 512 of them, up to a rotation, which changes no product of two.

Their common mean is taken away (it is the largest part of all of them), and they are scaled to a deviation of 0.25. A morpheme
is an entry twice, as a word's beginning and inside one (`##…`), as in klue's WordPiece, with one vector; Hangul syllables and Latin
letters that are no morphemes are entries, too, with the mean vector of the morphemes that they are in, or none (zeros).
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine_facts import stored_path
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.data.tokenizer import SPECIAL_TOKENS, CaptionTokenizer
from engine.data.tokenizer_files import SpecialTokens

_MORPHEMES = 80_000  # later numbers are spellings and senses of these
_ANCHORS = 400  # cosines with these give the vectors: more than their width
_WIDTH = 256
_STD = 0.25
_POSITIONS = 64
_WORD = re.compile(r"[가-힣]+|[A-Za-z]+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        print("kiwipiepy is not installed: see --help", file=sys.stderr)
        return 2
    kiwi = Kiwi(model_type="cong")
    numbers: dict[str, list[int]] = defaultdict(list)
    for number in range(_MORPHEMES):
        form = kiwi.morpheme(number).form
        if _WORD.fullmatch(form):
            numbers[form].append(number)
    vectors, error = _vectors(kiwi, numbers)
    _write(arguments.out, vectors)
    print(
        f"{len(vectors):,} forms; largest error of 1,000 cosines {error:.1e}; written to {stored_path(arguments.out)}"
    )
    return 0


def _vectors(kiwi: object, numbers: dict[str, list[int]]) -> tuple[dict[str, np.ndarray], float]:
    """A vector a form, the mean of its morphemes', centred and scaled; and how far restored cosines are from Kiwi's."""
    similarity = kiwi.morpheme_similarity  # type: ignore[attr-defined]
    # Some of the dictionary were never seen in training: their cosine with anything is no number.
    flat = [n for each in numbers.values() for n in each if np.isfinite(similarity(n, n))]
    generator = np.random.default_rng(0)
    anchors = [int(number) for number in generator.choice(flat, _ANCHORS, replace=False)]
    gram = np.array([[similarity(one, other) for other in anchors] for one in anchors])
    values, basis = np.linalg.eigh((gram + gram.T) / 2)
    values, basis = values[-_WIDTH:], basis[:, -_WIDTH:]
    is_large = values > 1e-6 * values[-1]
    to_vector = np.where(is_large, basis / np.sqrt(np.where(is_large, values, 1)), 0)  # (anchors, width)
    vectors = np.array([[similarity(number, anchor) for anchor in anchors] for number in flat]) @ to_vector
    pairs = generator.integers(0, len(flat), size=(1000, 2))
    error = max(abs(float(vectors[a] @ vectors[b]) - similarity(flat[a], flat[b])) for a, b in pairs)
    vectors -= vectors.mean(axis=0)
    vectors *= _STD / vectors.std()
    row = dict(zip(flat, vectors, strict=True))
    known = {form: [row[number] for number in each if number in row] for form, each in numbers.items()}
    found = {form: np.mean(each, axis=0) for form, each in known.items() if each}
    letters: dict[str, list[np.ndarray]] = defaultdict(list)
    for form, vector in found.items():
        for letter in form:
            letters[letter].append(vector)
    for letter, own in letters.items():
        found.setdefault(letter, np.mean(own, axis=0))
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,":
        found.setdefault(letter, np.zeros(_WIDTH))
    return found, error


def _write(out: Path, vectors: dict[str, np.ndarray]) -> None:
    forms = sorted(vectors)
    entries = [*SPECIAL_TOKENS, *forms, *(f"##{form}" for form in forms)]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names: dict[str, Any] = dict(
        zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), SPECIAL_TOKENS, strict=True)
    )
    out.mkdir(parents=True, exist_ok=True)
    CaptionTokenizer(tokenizer, SpecialTokens(**names)).save(out)
    table = np.stack([vectors[form] for form in forms])
    generator = torch.Generator().manual_seed(0)
    special = torch.empty(len(SPECIAL_TOKENS), _WIDTH, dtype=torch.float32).normal_(0, _STD, generator=generator)
    positions = torch.empty(_POSITIONS, _WIDTH, dtype=torch.float32).normal_(0, _STD, generator=generator)
    words = torch.from_numpy(np.concatenate([table, table]).astype(np.float32))
    save_file(
        {
            "embeddings.word_embeddings.weight": torch.cat([special, words]),
            "embeddings.position_embeddings.weight": positions,
        },
        out / "model.safetensors",
    )


if __name__ == "__main__":
    sys.exit(main())
