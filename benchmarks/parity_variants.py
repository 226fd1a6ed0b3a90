"""Compares random switches and sizes with dalle-pytorch itself: python benchmarks/parity_variants.py [--cases 24] [--seed 5] [--out DIR]

Needs dalle-pytorch 1.6.6 importable beside this package. Each case draws switches and sizes, builds dalle-pytorch's DALLE over its
DiscreteVAE with random weights, saves it as train_dalle.py does, imports it, and compares logits, the loss, and greedy tokens: theirs
from whole sequences, ours over the KV cache, one a step and several. The last line is one JSON document; the exit code is 1 where
something differs.
"""

import argparse
import importlib
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document
from torch import Tensor

from engine.decoding.sampler import Sampler
from engine.facts import facts
from engine.files import write_json
from engine.interop.importing import import_checkpoint
from engine.models.folder import load_part
from engine.sampling_params import SamplingParams, SequenceRequest

_PATTERNS = (
    ("full",), ("full",), ("axial_row", "axial_col"), ("conv_like",), ("full", "axial_row", "axial_col", "conv_like"),
    ("axial_col",),
)  # fmt: skip
_TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON document")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < arguments.cases:
        row = compare(*settings(draw), seed=len(rows))
        if row is not None:
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    document = {"benchmark": "parity_variants", **facts(torch.device("cpu")), "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "variants.json", document)
    print_document(document)
    return 0 if all(row["tokens_equal"] and max(row["logits"], row["loss"]) <= _TOLERANCE for row in rows) else 1


def settings(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a DALLE and of its DiscreteVAE."""
    depth = draw.choice([1, 2, 3, 5])
    dalle: dict[str, Any] = {
        "num_text_tokens": draw.choice([20, 50]), "text_seq_len": draw.choice([4, 7, 12]), "dim": draw.choice([24, 32, 40, 48]),
        "depth": depth, "heads": draw.choice([1, 2, 4]), "dim_head": draw.choice([8, 12, 16, 24]), "loss_img_weight": 7,
        "reversible": draw.random() < 0.3, "attn_types": draw.choice(_PATTERNS), "stable": draw.random() < 0.3,
        "shift_tokens": draw.random() < 0.5, "rotary_emb": draw.random() < 0.5, "sandwich_norm": draw.random() < 0.3,
        "share_input_output_emb": draw.random() < 0.3,
    }  # fmt: skip
    if not dalle["reversible"] and len(dalle["attn_types"]) == 1 and draw.random() < 0.4:
        dalle |= dict.fromkeys(("shared_attn_ids", "shared_ff_ids"), tuple(str(layer % 2) for layer in range(depth)))
    vae = {
        "image_size": draw.choice([8, 16, 32]), "num_layers": 2, "num_tokens": draw.choice([16, 40]), "codebook_dim": 12,
        "hidden_dim": 8, "num_resnet_blocks": draw.choice([0, 1]),
    }  # fmt: skip
    return dalle, vae


@torch.no_grad()
def compare(arguments: dict[str, Any], vae_arguments: dict[str, Any], *, seed: int) -> dict[str, Any] | None:
    """A row; None: dalle-pytorch does not build this."""
    theirs_library = importlib.import_module("dalle_pytorch")
    torch.manual_seed(seed)
    try:
        theirs = theirs_library.DALLE(vae=theirs_library.DiscreteVAE(**vae_arguments), **arguments).eval()
    except (AssertionError, ValueError):
        return None
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    T, V, N = arguments["text_seq_len"], arguments["num_text_tokens"], (vae_arguments["image_size"] // 4) ** 2
    text, image = torch.randint(1, V, (2, T)), torch.randint(vae_arguments["num_tokens"], (2, N))
    text[0, -2:] = 0
    logits, loss = theirs(text, image), theirs(text, image, return_loss=True)
    with tempfile.TemporaryDirectory() as scratch:
        file, model = Path(scratch) / "dalle.pt", Path(scratch) / "model"
        hparams = {name: value for name, value in arguments.items() if name != "sandwich_norm"}  # as train_dalle.py
        content = {"hparams": hparams, "vae_params": vae_arguments, "version": "1.6.6", "weights": theirs.state_dict()}
        torch.save(content, file)
        import_checkpoint(file, model)
        ours = load_part(model, "transformer")
    text_logits, image_logits = ours.logits(text, image)
    pairs = ((text_logits, logits[:, :T, : V + T]), (image_logits, logits[:, T : T + N, V + T :]))
    greedy = _greedy(theirs, text[:1], N, V + T)
    requests = [SequenceRequest(0, SamplingParams(temperature=0))]
    tokens = [Sampler(ours, speculative=speculative).generate(text[:1], requests) for speculative in (False, True)]
    return {
        "switches": {name: value for name, value in arguments.items() if value not in (False, ("full",))},
        "grid": vae_arguments["image_size"] // 4,
        "logits": max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs),
        "loss": abs(float(ours(text, image).loss - loss)),
        "tokens_equal": all(torch.equal(found, greedy) for found in tokens),
    }


def _greedy(theirs: Any, text: Tensor, num_tokens: int, first_row: int) -> Tensor:
    """(1, N), each token from a pass over all before it."""
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    for number in range(num_tokens):
        logits = theirs(text, tokens if number else None)
        tokens = torch.cat([tokens, logits[:, -1:, first_row:].argmax(-1)], dim=1)
    return tokens


if __name__ == "__main__":
    raise SystemExit(main())
