"""Garment classes: the commonest training captions without their colours.

A class is for example `하의에서 기장은 발목이다. 하의에서 카테고리는 팬츠이다.`; engine/metrics/independent_classifier.py
assigns images to them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.data.kfashion.captions import parse, particle
from engine.data.pairs import Pairs

_MOST_KINDS = 50  # more are told apart by attributes that no small picture shows

Triple = tuple[str, str, str]  # garment, attribute, value


@dataclass(frozen=True)
class GarmentClasses:
    """The commonest kinds of the training captions, K of them, as what each one tells."""

    told: tuple[tuple[Triple, ...], ...]
    colour: str  # attributes whose names end so are colours: 색상, 서브색상

    @property
    def captions(self) -> list[str]:
        return [
            " ".join(f"{garment}에서 {name}{particle(name)} {value}이다." for garment, name, value in kind)
            for kind in self.told
        ]

    def fitting(self, caption: str) -> frozenset[int]:
        """Numbers of the kinds that a caption may mean: those that tell all that it tells, colours left aside.

        A caption that leaves sentences out fits several; one that tells of a kind that is not here fits none.
        """
        triples = parse(caption)
        garments = {garment for garment, _, _ in triples}
        asked = set(_without_colours(triples, self.colour))
        return frozenset(
            number
            for number, kind in enumerate(self.told)
            if asked <= set(kind) and garments <= {garment for garment, _, _ in kind}
        )


def find_garment_classes(pairs: Pairs, colour_attribute: str) -> GarmentClasses | None:
    """None where the training captions are of another grammar than `engine.data.kfashion.captions`, or tell of one kind only."""
    counts = Counter(_without_colours(parse(pair.captions[0]), colour_attribute) for pair in pairs.train)
    del counts[()]
    commonest = sorted(counts, key=lambda kind: (-counts[kind], kind))[:_MOST_KINDS]
    return GarmentClasses(tuple(commonest), colour_attribute) if len(commonest) > 1 else None


def commonest_share(fitting: Sequence[frozenset[int]]) -> float | None:
    """The largest share that naming every picture alike would get right; None of no captions."""
    counts = Counter(number for kinds in fitting for number in kinds)
    return max(counts.values(), default=0) / len(fitting) if fitting else None


def _without_colours(triples: Iterable[Triple], colour: str) -> tuple[Triple, ...]:
    return tuple(triple for triple in triples if not triple[1].endswith(colour))
