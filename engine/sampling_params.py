"""What may be asked of a drawing: how its tokens are chosen, and whose noise they get.

Without torch, so that a server's edge can check a request before any model is loaded.
"""

from dataclasses import dataclass, replace

from engine.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How one row is drawn. Filters act on the image vocabulary, in this order; see `reference.filter_logits`.

    temperature: 0 takes the likeliest token.
    top_k: keep the k likeliest; None: all. `reference.ancestor_top_k` translates KoDALLE's filter_thres.
    top_p: of those, keep the fewest that reach this probability; None: all.
    guidance_scale: logits_null + scale * (logits - logits_null); 1 costs nothing, others a second row.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", self.temperature, "must be 0 or more; 1 is the model's own distribution")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", self.top_k, "must be 1 or more, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "must be above 0 and at most 1, or left out")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError("guidance_scale", self.guidance_scale, "must be 0 or more; 1 is no guidance")

    def but(self, **asked: float | None) -> "SamplingParams":
        """The same with what is asked for; None asks for nothing."""
        return replace(self, **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class SequenceRequest:
    """One picture: candidate number `candidate` of seed `seed` for caption `prefix_index`."""

    prefix_index: int
    seed: int
    candidate: int = 0
    options: SamplingParams = SamplingParams()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise InputError("seed", self.seed, "must be between 0 and 2**64 - 1")
        if not 0 <= self.candidate < 2**32:
            raise InputError("candidate", self.candidate, "must be between 0 and 2**32 - 1")
