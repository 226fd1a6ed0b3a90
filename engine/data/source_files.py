"""The files of a source folder, by what they are: label files, images, the rest; and the folders of its own split."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CONVERT = "for cp949: iconv -f cp949 -t utf-8"
# First-level folders that are a source's own split, in lower case.
SIDES: dict[str, Literal["train", "validation"]] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


@dataclass(frozen=True)
class SourceFolder:
    """The files of a labelled folder, sorted; `others` are neither labels nor images."""

    root: Path
    labels: tuple[Path, ...]
    images: dict[str, tuple[Path, ...]]  # by stem
    others: tuple[Path, ...]
    label_stems: frozenset[str]

    def find_image(self, label_path: Path, *names: str) -> Path | None:
        """The image of a label: by the label file's stem, else by the first of `names` that leads to one.

        Names are what a label says of its photo, which may be another photo's name on disk: they never lead to an image
        that has a label file of its own.
        """
        found = self._nearest(label_path, label_path.stem)
        for stem in names:
            if found is None and stem and stem not in self.label_stems:
                found = self._nearest(label_path, stem)
        return found

    def _nearest(self, label_path: Path, stem: str) -> Path | None:
        """Beside the label, else in images/ for labels/, else the only one on the same side of the split."""
        candidates = self.images.get(stem, ())
        place = label_path.parent
        parts = place.relative_to(self.root).parts
        twin = self.root.joinpath(*("images" if part.lower() == "labels" else part for part in parts))
        for wanted in (place, twin):
            here = [path for path in candidates if path.parent == wanted]
            if here:
                return here[0]
        elsewhere = [path for path in candidates if self._side(path) == self._side(label_path)]
        return elsewhere[0] if len(elsewhere) == 1 else None

    def _side(self, path: Path) -> str:
        return SIDES.get(path.relative_to(self.root).parts[0].lower(), "")


def scan(root: Path) -> SourceFolder:
    """Lists `root` recursively: `labels/*.json` + `images/*.jpg`, or `<any folder>/<id>.{json,jpg}`."""
    labels: list[Path] = []
    images: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in files_under(root):
        if path.suffix.lower() == ".json":
            labels.append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.stem, []).append(path)
        else:
            others.append(path)
    stems = frozenset(path.stem for path in labels)
    return SourceFolder(root, tuple(labels), {k: tuple(v) for k, v in images.items()}, tuple(others), stems)


def files_under(root: Path) -> Iterator[Path]:
    """All files under `root`, sorted by path, without hidden files and folders (leftovers of archivers)."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path
