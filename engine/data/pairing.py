"""Which photograph a label file is about.

Deliveries keep labels and photographs in parallel folders (`Training/라벨링데이터/레트로/X.json` and
`Training/원천데이터/레트로/X.jpg`, `labels/` and `images/`, `[라벨]레트로/` and `[원천]레트로/`, `TL_1/` and `TS_1/`) or side by
side. File names repeat from one folder to the next, so a folder's place counts before a name. A label's photograph is, in
this order,

    1. of the label file's name, in its own folder or the parallel one;
    2. there, of a name that the label states (its photo's id, its image's file name);
    3. anywhere on the same side of the split: of the label file's name, then of a stated one, if one photograph alone has
       it, and no second label file where the label's own place has photographs.

A stated name may by chance be another photograph's, so it never leads to one that has a label file of its own (1). Several
labels may be of one photograph. Every lookup is one of a dictionary: the work is linear in the files.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.data.names import readable_name
from engine.data.source_files import SIDES, SourceFolder, stem_of, without_number

# Folders that say what their files are and nothing about which photograph; in lower case, without a number before them.
_ROLES = frozenset(
    ["label", "labels", "annotation", "annotations", "json", "라벨링데이터", "라벨데이터", "라벨링", "라벨"]
    + ["image", "images", "photo", "photos", "원천데이터", "원시데이터", "원천", "이미지"]
)
_MARK = re.compile(r"^(?:\[(?:라벨링?|라벨링데이터|라벨데이터|원천|원시|원천데이터)\]\s*|([tv])[ls](?=[_ \d]))")


@dataclass(frozen=True)
class Pairing:
    """What became of each file; paths are those of the `SourceFolder`.

    Args:
        image_of: label file to image.
        alike: images that a label would lead to, had it not taken another one of that name: image to the one taken.
        stated: labels that found their image by a name that they state, not by their own.
        refused: labels without an image that state the name of one that has a label file of its own: label to that one.
    """

    image_of: dict[str, str]
    alike: dict[str, str] = field(default_factory=dict)
    stated: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    def photos(self) -> list[tuple[str, list[str]]]:
        """Each image with its label files, in the order of their first ones."""
        grouped: dict[str, list[str]] = {}
        for label, image in self.image_of.items():
            grouped.setdefault(image, []).append(label)
        return list(grouped.items())


def pair_files(folder: SourceFolder, stated_names: Callable[[str], Sequence[str]]) -> Pairing:
    """Finds the image of each label file.

    Args:
        stated_names: names without suffix that a label file states; called only for those that are not found by their own.
    """
    return _Finder(folder, stated_names).pairing()


def _place(parent: str) -> str:
    """What a folder's path says about which photographs its files are of."""
    return "/".join(part for part in map(_plain, parent.split("/")) if part)


def _plain(part: str) -> str:
    plain = without_number(part)
    if plain in _ROLES:
        return ""
    # `TL_1` and `TS_1` are one place, `VL_1` another
    return _MARK.sub(lambda found: f"[{found[1]}]" if found[1] else "", readable_name(part).strip().lower())


def _side(parent: str) -> str:
    """The side of the split that a folder lies on, as far as names tell."""
    return next((SIDES[part] for part in map(without_number, parent.split("/")) if part in SIDES), "")


class _Finder:
    def __init__(self, folder: SourceFolder, stated_names: Callable[[str], Sequence[str]]) -> None:
        self._folder = folder
        self._stated_names = stated_names
        self._parents: dict[str, tuple[str, str]] = {}
        self._here: dict[tuple[str, str], list[str]] = {}
        for image in folder.images:
            self._here.setdefault((self._parent(image)[0], stem_of(image)), []).append(image)

    def pairing(self) -> Pairing:
        labels = self._folder.labels
        found = {label: image for label in labels if (image := self._at_place(label, stem_of(label)))}
        stated, open_names = [], {}
        refused: dict[str, str] = {}
        if len(found) < len(labels):
            own = {image: label for label, image in reversed(found.items())}
            taken = set(own)
            known = {name for _, name in self._here}
            for label in [label for label in labels if label not in found]:
                names = [readable_name(name) for name in self._stated_names(label) if name]
                images = [image for name in names if (image := self._at_place(label, name))]
                image = next((image for image in images if image not in taken), None)
                if image is not None:
                    found[label] = image
                    stated.append(label)
                else:
                    if images:
                        refused[label] = own[images[0]]
                    open_names[label] = [name for name in dict.fromkeys([stem_of(label), *names]) if name in known]
            found |= self._elsewhere(open_names, taken | set(found.values()))
        in_order = {label: found[label] for label in labels if label in found}
        refused = {label: other for label, other in refused.items() if label not in found}
        return Pairing(in_order, self._alike(in_order), tuple(stated), refused)

    def _at_place(self, label: str, name: str) -> str | None:
        """The image of that name in the label's folder, else in the parallel one."""
        place, _ = self._parent(label)
        candidates = self._here.get((place, name), [])
        beside = [image for image in candidates if image.rpartition("/")[0] == label.rpartition("/")[0]]
        if beside:
            return beside[0]
        return candidates[0] if len({image.rpartition("/")[0] for image in candidates}) == 1 else None

    def _elsewhere(self, names: dict[str, list[str]], taken: set[str]) -> dict[str, str]:
        """Images of labels by name alone, for names that one image on their side of the split has, and one label."""
        wanted = {name for own in names.values() for name in own}
        if not wanted:
            return {}
        images: dict[tuple[str, str], list[str]] = {}
        for (_, name), paths in self._here.items():
            for path in paths if name in wanted else ():
                images.setdefault((self._parent(path)[1], name), []).append(path)
        labels = Counter((self._parent(path)[1], stem_of(path)) for path in self._folder.labels)
        places = {place for place, _ in self._here}
        found = {}
        for label, own in names.items():
            place, side = self._parent(label)
            for name in own:
                candidates = images.get((side, name), [])
                is_clear = place not in places or labels[side, name] <= 1
                if len(candidates) == 1 and candidates[0] not in taken and is_clear:
                    found[label] = candidates[0]
                    break
        return found

    def _parent(self, path: str) -> tuple[str, str]:
        """Place and side of a file."""
        parent = path.rpartition("/")[0]
        if parent not in self._parents:
            self._parents[parent] = _place(parent), _side(parent)
        return self._parents[parent]

    def _alike(self, image_of: dict[str, str]) -> dict[str, str]:
        taken = set(image_of.values())
        alike: dict[str, str] = {}
        for images in self._here.values():
            if len(images) > 1 and (first := next((image for image in images if image in taken), None)):
                alike |= {image: first for image in images if image not in taken}
        return alike
