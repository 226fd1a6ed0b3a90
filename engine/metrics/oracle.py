"""Whether generations are right, where that can be computed from pixels: of drawn images, say, whose rules are known."""

from collections.abc import Callable, Sequence

from PIL import Image

from engine.data.pairs import Pair

Right = dict[str, bool]
Oracle = Callable[[Pair, Sequence[Image.Image]], list[Right]]
"""For each image of a caption, what of it is right, by measure; the pair is the one that the caption belongs to."""


def shares_right(right: Sequence[Sequence[Right]], real: Sequence[Right]) -> dict[str, dict[str, float]]:
    """Shares of right images by measure.

    Args:
        right: for each caption, of its candidates, best first.
        real: for each caption, of its own image: what the oracle's word is worth.

    Returns:
        real; random: of all candidates, the expectation of one; top_ranked; any: of captions with at least one right
        candidate, the bound of a perfect ranker.
    """
    groups: dict[str, list[Right]] = {
        "real": list(real),
        "random": [one for candidates in right for one in candidates],
        "top_ranked": [candidates[0] for candidates in right],
        "any": [{name: any(one[name] for one in candidates) for name in candidates[0]} for candidates in right],
    }
    return {
        who: {name: round(sum(one[name] for one in ones) / len(ones), 4) for name in ones[0]}
        for who, ones in groups.items()
    }
