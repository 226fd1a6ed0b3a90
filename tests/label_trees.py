"""K-Fashion labels and photos for the tests of checking and preparing folders."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.kfashion.labels import GARMENT_TYPES

WIDTH, HEIGHT = 40, 60  # pixels
TOP = {"카테고리": "티셔츠", "색상": "화이트"}
BOX = {"X좌표": 4.0, "Y좌표": 6.0, "가로": 20, "세로": 30}


def polygon(*points: tuple[float, float]) -> dict[str, Any]:
    """An outline as K-Fashion writes it."""
    return {
        f"{axis}좌표{number}": value
        for number, point in enumerate(points, 1)
        for axis, value in zip("XY", point, strict=True)
    }


def label_tree(
    identifier: Any, *, boxes: dict[str, Any], polygons: dict[str, Any] | None = None, **labelling: Any
) -> dict[str, Any]:
    """A label file's content; garment types that are not given in a part are absent from it as in K-Fashion: `[{}]`."""
    absent: dict[str, Any] = {garment_type: [{}] for garment_type in GARMENT_TYPES}
    return {
        "이미지 정보": {
            "이미지 식별자": identifier,
            "이미지 높이": HEIGHT,
            "이미지 파일명": "s.jpg",
            "이미지 너비": WIDTH,
        },
        "데이터셋 정보": {
            "데이터셋 상세설명": {
                "렉트좌표": {**absent, **boxes},
                "폴리곤좌표": {**absent, **(polygons or {})},
                "라벨링": {"스타일": [{}], **absent, **labelling},
            }
        },
    }


def photo(path: Path, seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Writes noise of (width, height) `size` to `path`; equal seeds give equal pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
