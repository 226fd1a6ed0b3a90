"""Digests stay what they were: runs and token shards of earlier versions are compared with them."""

from pathlib import Path

import pytest

from engine.data import digests
from engine.data.digests import image_digests, pairs_digests
from engine.data.pairs import Pair, Pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    found = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        path.write_bytes(f"image {number}".encode())
        captions = (f"상의 {number}", "둘") if number % 2 else (f"상의 {number}",)
        split = "validation" if number == 3 else "train"
        found.append(Pair(f"{number}_top_0", path, captions, str(number), split, {"색상": "블랙"}))  # type: ignore[arg-type]
    return Pairs(tuple(found))


def test_digests_are_those_of_earlier_versions(pairs: Pairs) -> None:
    assert pairs_digests(pairs) == {
        "training captions": "b7e04c42df028f5b44f248fcd5abca6d4009f25bdf92a4b1dac0ca5f382a705c",
        "training images": "537d1ea5925c2d5081458c5ccbddfe89cd26cfc0b4b1ba14a32a921d70fa812c",
        "held-out captions": "162da1036d225ff8f77b1618d42d98a63d1ebf1c50f4c6c6364a51971f78490f",
        "held-out images": "9a098e860b8500f10ede47aad988490611e174f325220c2e9832bd311d29b7a8",
    }
    balanced = "8ed6d2446bf1213fad4dc50c7fb36ec20800f4a90b9e9c3684f48417bc6360e8"
    assert pairs_digests(pairs, balance="색상")["training captions"] == balanced


def test_images_are_read_a_few_at_a_time(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(image_digests(pairs.all))
    monkeypatch.setattr(digests, "_AT_A_TIME", 4)
    assert list(image_digests(pairs.all)) == whole
    monkeypatch.setattr(digests, "_AT_A_TIME", 2)
    pairs.all[-1].image_path.unlink()
    first = image_digests(pairs.all)
    assert [next(first) for _ in range(4)] == whole[:4]  # the last was not read yet
    first.close()  # type: ignore[attr-defined]
