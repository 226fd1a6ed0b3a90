"""Captioned squares and garments to evaluate on, and a classifier of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import load_image, load_pairs
from engine.metrics.classifier_training import fit
from engine.metrics.independent_classifier import save_classifier
from engine.metrics.lite0_features import Lite0Encoder

COLOURS = {"레드": (200, 40, 50), "블루": (50, 80, 180), "그린": (40, 140, 70), "블랙": (30, 30, 30)}


def write_pairs(folder: Path, *, held_out: int, train: int = 16) -> Path:
    """Squares on a light ground: 16 to train on, `held_out` held out, four of which share a caption with another."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(train + held_out):
        name = list(COLOURS)[number % 4]
        pixels = np.full((32, 32, 3), 235, np.uint8)
        size = 4 + number % 3
        pixels[16 - 2 * size : 16 + 2 * size, 8:24] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"images/{number:03d}.png")
        lines.append({
            "key": f"{number:03d}", "image": f"images/{number:03d}.png", "photo": f"{number:03d}",
            "caption": f"{name} 네모 {size}", "split": "train" if number < train else "validation",
            "attributes": {"색상": name},
        })  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def with_garments(folder: Path) -> Path:
    """`write_pairs` with captions of the grammar: shirts, wider than tall, and trousers, taller than wide."""
    file = folder / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines):
        garment, category = [("상의", "셔츠"), ("하의", "팬츠")][number // 4 % 2]
        colour = line["attributes"]["색상"]
        line["caption"] = f"{garment}에서 색상은 {colour}이다. {garment}에서 카테고리는 {category}이다."
        line["attributes"] = {"garment": garment, "색상": colour, "카테고리": category}
        pixels = np.full((32, 32, 3), 235, np.uint8)
        pixels[4:28, 10:22] = COLOURS[colour]
        Image.fromarray(pixels if category == "팬츠" else pixels.transpose(1, 0, 2)).save(folder / line["image"])
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_classifier(folder: Path, pairs: Path, *, blind: bool = False) -> Path:
    """Of shirts and trousers: by whether the subject, in `with_garments`, is taller than wide; `blind`: one answer."""
    classes = find_caption_classes(load_pairs(pairs))
    assert classes is not None
    encoder, by_class = Lite0Encoder(torch.device("cpu")), []
    for garment in ("셔츠", "팬츠"):
        some = [pair for pair in load_pairs(pairs).train if garment in pair.captions[0]]
        images = np.stack([load_image(pair, 32) for pair in some])
        by_class.append(encoder.encode([torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255]))
    order = [0, 1] if classes.facts[0][0].value == "셔츠" else [1, 0]
    labels = torch.tensor([number for number, own in zip(order, by_class, strict=True) for _ in own])
    classifier = fit(torch.cat(by_class), labels, classes.facts)
    if blind:
        classifier = dataclasses.replace(classifier, weight=torch.zeros_like(classifier.weight))
    save_classifier(folder, classifier, {})
    return folder
