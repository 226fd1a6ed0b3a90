"""What held-out figures mean, in words: each verdict is a pure function of figures.

A figure alone says little to a newcomer. The thresholds are wide, and where a figure is too
uncertain for a verdict (a few held-out images), the verdict says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["good", "fair", "bad", "unknown"]

FEW_HELD_OUT = 20  # below, a share of them is off by 20 points and more
_SURE = 0.05  # probability of a share by luck, above which nothing is said to be learnt
_RISE = 1.02  # of the validation loss over its lowest, from which a model is past its best
_LEAST_OF_REAL = 0.8  # of real images read as labelled, below which what reads them says nothing about generated ones
_FALL = 0.99  # of it over the last fifth of the run, below which it still learns


@dataclass(frozen=True)
class Verdict:
    """One sentence about one part; `remedy` is empty where nothing needs one."""

    subject: str
    level: Level
    text: str
    remedy: str = ""


def held_out(count: int) -> Verdict | None:
    """Whether there are enough held-out images for figures to mean much; None where there are."""
    if count >= FEW_HELD_OUT:
        return None
    return Verdict(
        "held-out images",
        "unknown",
        f"{count} held-out images: every figure below is rough",
        "add images and train again, or train on from a model of such images: --from",
    )


def reconstruction(psnr_db: float) -> Verdict:
    """What the codec loses, at the sizes that this project trains."""
    figure = f"reconstructions of held-out images: {psnr_db:.1f} dB"
    if psnr_db >= 24:
        return Verdict("VQGAN", "good", f"{figure}, close to the originals")
    remedy = "more steps (vqgan.loop.steps), or more images"
    if psnr_db >= 19:
        return Verdict("VQGAN", "fair", f"{figure}: shapes and colours are kept, details are blurred", remedy)
    return Verdict("VQGAN", "bad", f"{figure}: generated images cannot be better than these", remedy)


def codebook(used: int, size: int, tokens: int) -> Verdict:
    """How many codes the training images use.

    Args:
        used: codes that occur in them.
        size: codes there are.
        tokens: tokens of all training images.
    """
    text = f"codebook: {used:,} of {size:,} codes in use"
    if used >= 0.5 * min(size, tokens):
        return Verdict("codebook", "good", text)
    level: Level = "fair" if used >= 0.1 * size else "bad"
    return Verdict("codebook", level, text, "a smaller vqgan.model.codebook_size, or more steps")


def ranker(recall: float, among: int, pairs: int) -> Verdict:
    """Whether the ranker tells right captions from wrong ones.

    Args:
        recall: share of held-out images whose own caption scores highest.
        among: captions that compete.
        pairs: held-out images.
    """
    chance = 1 / max(1, among)
    figure = f"the right caption of {among} wins for {recall:.0%} of the held-out images (guessing: {chance:.0%})"
    remedy = "more images, or captions that differ more; koclip.loop.steps"
    if among < 2:
        return Verdict("ranker", "unknown", "held-out captions are all the same: nothing to rank", remedy)
    if recall <= chance + 1e-9:
        return Verdict(
            "ranker", "bad", f"the ranker has learnt nothing: right and wrong captions score alike; {figure}", remedy
        )
    if _luck(round(recall * pairs), pairs, chance) > _SURE:
        return Verdict(
            "ranker", "unknown", f"the ranker may have learnt nothing: {figure}, which luck can give", remedy
        )
    if recall < min(0.95, 3 * chance):
        return Verdict("ranker", "fair", f"the ranker has learnt a little: {figure}", remedy)
    return Verdict("ranker", "good", f"the ranker tells captions apart: {figure}")


def _luck(right: int, trials: int, chance: float) -> float:
    """Probability that a guesser has `right` or more of `trials` right (binomial)."""
    if chance >= 1:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log(1 - chance)
        for k in range(right, trials + 1)
    ]  # fmt: skip
    return sum(map(math.exp, logs))


def best_step(name: str, losses: Sequence[tuple[int, float]], choice: Mapping[str, Any]) -> Verdict:
    """Where the last model stands on its validation curve.

    Args:
        name: "the transformer".
        losses: (step, validation loss) in the order of steps.
        choice: `taken`, model or model-best, and the `scores` of both where two were compared.
    """
    if len(losses) < 2:
        return Verdict(name, "unknown", f"{name} was validated {len(losses)} times: too few for a curve")
    (best, lowest), (last, final) = min(losses, key=lambda one: one[1]), losses[-1]
    if is_past_best(losses):
        scores = choice.get("scores", {})
        shown = (
            f", whose images fit held-out captions better ({max(scores.values()):.2f} against {min(scores.values()):.2f})"
            if scores
            else ""
        )
        of = "the last one" if choice["taken"] == "model" else "the one of its best step"
        return Verdict(
            name, "fair",
            f"{name} is past its best step: validation loss {lowest:.3f} at step {best:,}, {final:.3f} at {last:,}; "
            "it memorises its training images",
            f"fewer steps or more images; the exported model is {of}{shown}",
        )  # fmt: skip
    before = next((loss for step, loss in reversed(losses) if step <= 0.8 * last), losses[0][1])
    if final < before * _FALL:
        return Verdict(
            name, "fair", f"{name} still improves at its last step, {last:,}: validation loss {before:.3f} to {final:.3f}",
            "more steps: a longer budget in another folder",
        )  # fmt: skip
    return Verdict(name, "good", f"{name} is at its best: validation loss {final:.3f} at its last step, {last:,}")


def is_past_best(losses: Sequence[tuple[int, float]]) -> bool:
    """Whether the validation loss rose from its lowest by more than noise."""
    return bool(losses) and losses[-1][1] > _RISE * min(loss for _, loss in losses)


def transformer(loss_image: float, codes_in_use: int) -> Verdict:
    """Whether image tokens are predicted better than by guessing among the codes that are used.

    Args:
        loss_image: of held-out images, in nats a token.
        codes_in_use: by the training images.
    """
    guessing = math.log(max(2, codes_in_use))
    figure = f"{loss_image:.2f} nats a token of held-out images (guessing among the codes: {guessing:.2f})"
    if loss_image >= 0.98 * guessing:
        return Verdict(
            "transformer", "bad", f"the transformer has learnt nothing: {figure}", "more steps or more images"
        )
    if loss_image >= 0.7 * guessing:
        return Verdict(
            "transformer", "fair", f"the transformer knows something of the images: {figure}", "more steps or images"
        )
    return Verdict("transformer", "good", f"the transformer knows what the images look like: {figure}")


def following(real: float, other: float | None, top_ranked: float, random: float, *, captions: int) -> Verdict | None:
    """Whether generated images fit their captions, by the ranker's own scores; None where it cannot tell them apart.

    Args:
        real: mean score of held-out captions with their own images.
        other: with another caption's image.
        top_ranked, random: with the best and with any generated image.
        captions: held-out ones.
    """
    if other is None or real - other < 0.05:
        return None
    share = (random - other) / (real - other)
    figure = f"scores: generated {random:.2f}, ranked best {top_ranked:.2f}; real images {real:.2f}, of other captions {other:.2f}"
    if share >= 0.6 and captions < FEW_HELD_OUT:
        text = f"generated images seem to follow their captions, by a ranker that knows as few images; {figure}"
        return Verdict("generation", "fair", text, "look at them: this is a guess from a few captions")
    if share >= 0.6:
        return Verdict("generation", "good", f"generated images follow their captions; {figure}")
    remedy = "more steps (kodalle.loop.steps), more images, or a higher guidance_scale"
    if share >= 0.2:
        return Verdict("generation", "fair", f"generated images follow their captions in part; {figure}", remedy)
    return Verdict("generation", "bad", f"generated images do not follow their captions; {figure}", remedy)


def by_oracle(shares: Mapping[str, Mapping[str, float]], captions: int) -> Verdict:
    """How many generations are right, for data whose right answer is computed from pixels.

    Args:
        shares: right images by measure, of real images, of random and of top-ranked candidates; see engine/metrics/oracle.py.
        captions: held-out ones.
    """
    measures = [name for name in shares["top_ranked"] if name != "all"]
    if shares["real"]["all"] < _LEAST_OF_REAL:
        text = f"only {shares['real']['all']:.0%} of the real images are read as their labels say"
        return Verdict("generation", "unknown", text, "look at the images yourself: what reads them is made for others")
    right = shares["top_ranked"]["all"]
    text = (
        f"{right:.0%} of the best-ranked images of {captions} held-out captions have {', '.join(measures)} right "
        f"(a random candidate: {shares['random']['all']:.0%}; real images: {shares['real']['all']:.0%})"
    )
    remedy = "more steps (kodalle.loop.steps)"
    if right >= 0.8:
        return Verdict("generation", "good", text)
    return Verdict("generation", "fair" if right >= 0.4 else "bad", text, remedy)


def variety(difference: float | None) -> Verdict | None:
    """Whether the candidates of one caption differ; None where there is one a caption.

    Args:
        difference: standard deviation of a pixel over the candidates, of [0, 1].
    """
    if difference is None:
        return None
    if difference < 0.01:
        return Verdict(
            "generation", "bad", f"all candidates of a caption look alike ({difference:.3f} of the pixel range)",
            "a higher temperature",
        )  # fmt: skip
    return Verdict("generation", "good", f"candidates of a caption differ by {difference:.3f} of the pixel range")


def captions_cut(cut: int, pairs: int) -> Verdict | None:
    """Captions that did not fit; None where all did."""
    if not cut:
        return None
    return Verdict(
        "captions", "fair" if cut < 0.05 * pairs else "bad", f"{cut:,} of {pairs:,} captions are too long: their ends were cut",
        "shorten them, or raise the text length (koclip and kodalle: model.text_seq_len)",
    )  # fmt: skip
