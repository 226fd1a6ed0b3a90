"""A K-Fashion delivery as it is handed over, small: two sides, folders of labels and photographs by style.

    <root>/Training/라벨링데이터/<style>/(116)IMG_1.json      <root>/Training/원천데이터/<style>/(116)IMG_1.jpg

File names repeat from style to style, and the id in a label is another number.
"""

import json
from pathlib import Path
from typing import Any

from engine.data.kfashion.labels import GARMENT_TYPES
from tests.label_trees import BOX, TOP, label_tree, photo

STYLES = ("레트로", "모던")
COLOURS = ("화이트", "블랙", "레드", "블루", "그린", "옐로우")


def label_path(root: Path, name: str, *, side: str = "Training", style: str = STYLES[0]) -> Path:
    return root / side / "라벨링데이터" / style / f"{name}.json"


def photo_path(root: Path, name: str, *, side: str = "Training", style: str = STYLES[0], suffix: str = ".jpg") -> Path:
    return root / side / "원천데이터" / style / f"{name}{suffix}"


def write_label(
    path: Path, identifier: Any, *, image: str = "", boxes: dict[str, Any] | None = None, **labelling: Any
) -> Path:
    """A label of one top, or of `labelling` with `boxes`; `image` is what it says of its file's name."""
    labelling = labelling or {"상의": [TOP]}
    boxes = boxes or {name: [BOX] * len(labelling[name]) for name in labelling if name in GARMENT_TYPES}
    tree = label_tree(identifier, boxes=boxes, **labelling)
    tree["이미지 정보"]["이미지 파일명"] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return path


def delivery(root: Path, *, photos: int = 3, held_out: int = 1) -> Path:
    """`photos` labelled photographs of each style to train on, `held_out` to validate with; none twice."""
    number = 0
    for side, count in (("Training", photos), ("Validation", held_out)):
        for style in STYLES:
            for index in range(1, count + 1):
                number += 1
                name, top = f"({115 + index})IMG_{index}", {**TOP, "색상": COLOURS[number % len(COLOURS)]}
                write_label(
                    label_path(root, name, side=side, style=style), 1000 + number, image=f"{name}.jpg", 상의=[top]
                )
                photo(photo_path(root, name, side=side, style=style), number)
    return root
