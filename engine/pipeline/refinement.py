"""Refinement: an image's tokens moved by gradient until a ranker finds that the image fits its caption better.

    refined = refine_generation(pipeline, generation, Refinement(steps=60), count=4)

    latent vectors ─► nearest codes' ─► decoder ─► cut-outs ─► ranker ─► mean score      Adam moves the latent vectors;
       (N, Z)            (N, Z)         (3, S, S)  (c, 3, s, s)                          the codes are its result

VQGAN+CLIP (Crowson et al. 2022, arXiv:2204.08583, and its notebooks; Text2Art) starts from noise or a photograph, this from the tokens
that the transformer sampled. As there: gradients pass straight through the choice of the nearest code, latent vectors stay within the
codes' range, and the ranker sees cut-outs that are moved, turned, mirrored and noisy, so that no single pixel can please it. Latent
vectors are those that the decoder reads (`latent_table`), of whatever family the codec is.

The transformer has no part in it: what the ranker likes is found, likely or not, and a ranker can be pleased by texture that is no
better garment. What it did to images of 40 captions, by measures that did not guide it: docs/generation.md.

An image's result depends on its tokens, caption, seed and candidate number alone: each is refined on one thread of its own, on a CPU
with equal bits whatever else runs. On a GPU gradients of cut-outs are summed in any order, so last bits and in time codes differ.

n images, N tokens, Z width of a latent vector, K codes, S pixels, c cut-outs, s the ranker's pixels.
"""

import copy
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codec.threads import single_threads
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.models.image_codec import ImageCodec
from engine.models.quantiser import nearest_rows
from engine.models.ranker import Ranker
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.provenance import Refinement
from engine.pipeline.torch_state import exact, timed

_LEAST_SIDE = 0.5  # of a cut-out, of the image's shorter side
_MOST_TURN = math.radians(10)
_MOST_NOISE = 0.1  # standard deviation, of pixels in [0, 1]
OnStep = Callable[[int, int], None]
"""Called with (steps done of all images, all steps), one call at a time."""
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class GuidingRanker:
    """A ranker that guides a refinement, beside the model's own; on the pipeline's device."""

    ranker: Ranker
    tokenizer: CaptionTokenizer
    digest: str


def refine_generation(
    pipeline: Pipeline,
    generation: Generation,
    refinement: Refinement,
    *,
    count: int | None = None,
    guide: GuidingRanker | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Refines the best images of a generation; what an init image fixed stays.

    Args:
        count: how many; None: all.
        guide: what to please; None: the model's own ranker.

    Returns:
        The refined images, scored and ranked among themselves as `Pipeline.finish` does.

    Raises:
        InputError: a model without a ranker, and no other one.
    """
    if guide is None and pipeline.koclip is None:
        raise InputError("refine", "(no ranker)", "this model has none: give the folder of one, --refine-with FOLDER")
    ranker = guide.ranker if guide is not None else pipeline.koclip
    tokenizer = guide.tokenizer if guide is not None else pipeline.ranker_tokenizer
    assert ranker is not None
    chosen = generation.candidates[:count]
    request = replace(
        generation.request,
        candidates=tuple(one.candidate for one in chosen),
        refinement=refinement.model_copy(update={"ranker_digest": None if guide is None else guide.digest}),
    )
    tokens = torch.tensor([one.image_tokens for one in chosen], dtype=torch.int64, device=pipeline.device)
    timings_s = dict(generation.timings_s)
    with exact(pipeline.device), timed(timings_s, "refinement", pipeline.device):
        text_tokens = tokenizer.encode([generation.caption], ranker.config.text_seq_len).tokens.to(pipeline.device)
        refined = refine_tokens(
            pipeline.vqgan,
            ranker,
            tokens,
            text_tokens,
            refinement,
            seeds=[_seed(one.seed, one.candidate) for one in chosen],
            grid=request.grid,
            free=None if request.init_tokens is None else request.init_tokens < 0,
            on_step=on_step,
        )
    return pipeline.finish(request, refined, timings_s=timings_s)


def refine_tokens(
    codec: ImageCodec,
    ranker: Ranker,
    image_tokens: Tensor,
    text_tokens: Tensor,
    refinement: Refinement,
    *,
    seeds: Sequence[int],
    grid: tuple[int, int] | None = None,
    free: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Refines the tokens of images of one caption.

    Args:
        image_tokens: (n, N) int64.
        text_tokens: (1, T), the caption in the ranker's tokens.
        seeds: of each image's cut-outs.
        grid: rows and columns of tokens; None: the codec's.
        free: (N,) bool, which tokens may change; None: all.

    Returns:
        (n, N) int64.
    """
    grid = grid or (codec.config.grid_size, codec.config.grid_size)
    lock, counter, total = threading.Lock(), itertools.count(1), refinement.steps * len(image_tokens)

    def report() -> None:
        if on_step is not None:
            with lock:
                on_step(next(counter), total)

    def refine(seen: _Seen, tokens: Tensor, seed: int) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), exact(tokens.device):
            return seen.refine(tokens, torch.Generator("cpu").manual_seed(seed), free, report)

    if image_tokens.device.type != "cpu":
        seen = _Seen(codec, ranker, text_tokens, refinement, grid)
        return torch.stack([refine(seen, *each) for each in zip(image_tokens, seeds, strict=True)])
    with single_threads() as (pool, _):
        seen = _Seen(codec, ranker, text_tokens, refinement, grid)  # the caption too, on one thread
        return torch.stack(list(pool.map(functools.partial(refine, seen), image_tokens, seeds)))


class _Seen:
    """What the ranker sees of latent vectors, differentiably; with copies of the networks that need no gradients of their own."""

    def __init__(
        self, codec: ImageCodec, ranker: Ranker, text_tokens: Tensor, refinement: Refinement, grid: tuple[int, int]
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._table = codec.latent_table().clone()  # (K, Z)
            self._decoder, self._ranker = _frozen(codec.decoder), _frozen(ranker)
            self._text = ranker.embed_texts(text_tokens).clone()  # (1, E)
        self._to_images, self._refinement, self._grid = codec.to_images, refinement, grid

    def refine(
        self, tokens: Tensor, generator: torch.Generator, free: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        """(N,) -> (N,)."""
        lowest, highest = self._table.amin(0), self._table.amax(0)
        start = self._table[tokens]  # (N, Z)
        latents = start.clone().requires_grad_()
        # The default eps would hold back latents where a ranker's scores hardly differ.
        adam = torch.optim.Adam([latents], lr=self._refinement.step_size * float(self._table.std()), eps=1e-16)
        for _ in range(self._refinement.steps):
            (gradient,) = torch.autograd.grad(-self.score(latents, generator), latents)
            latents.grad = gradient if free is None else gradient * free[:, None]
            adam.step()
            with torch.no_grad():
                latents.clamp_(lowest, highest)
            on_step()
        # What has not moved keeps its code, though another's vector may be as near to the last bit.
        return torch.where((latents == start).all(1), tokens, nearest_rows(latents, self._table))

    def score(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Mean score of the cut-outs of an image, (N, Z) -> scalar."""
        quantised = straight_through(latents, self._table).view(1, *self._grid, -1).permute(0, 3, 1, 2)
        weight = next(self._decoder.parameters())
        image = self._to_images(self._decoder(quantised.to(weight.dtype)))  # (1, 3, H, W)
        cut = cut_outs(image, self._refinement.cut_outs, generator, least_side=self._ranker.config.image_size)
        embeddings = self._ranker.embed_pixels(self._ranker.prepare(cut))
        return self._ranker.scores(embeddings, self._text).mean()


def straight_through(latents: Tensor, table: Tensor) -> Tensor:
    """The nearest rows of a table, exactly; their gradient is that of the latent vectors: (N, Z), (K, Z) -> (N, Z)."""
    chosen = table[nearest_rows(latents, table)]
    return chosen + (latents - latents.detach())  # zero, with a gradient; latents + (chosen - latents) would round


def cut_outs(image: Tensor, count: int, generator: torch.Generator, *, least_side: int) -> Tensor:
    """Random square parts of an image, differentiably: half to the whole of its shorter side, turned, mirrored, with noise.

    Args:
        image: (1, 3, H, W) in [0, 1]. What lies outside is its border's colour.
        generator: on the CPU.
        least_side: pixels that a part has at least; more where the image has more, since the ranker's own resizing is smoother.

    Returns:
        (count, 3, s, s).
    """
    height, width = image.shape[2:]
    shorter, side = min(height, width), max(least_side, min(height, width))

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")

    share = _LEAST_SIDE + (1 - _LEAST_SIDE) * random(count)  # of the shorter side
    turn = _MOST_TURN * (2 * random(count) - 1)
    mirror = torch.where(random(count) < 0.5, -1.0, 1.0)
    # In grid_sample's coordinates the image spans -1 to 1 both ways, so a cut-out's extent is over the image's own side.
    across, down = share * shorter / width, share * shorter / height
    reach = torch.stack([across, down], dim=1)  # (c, 2)
    centre = (1 - reach) * (2 * random(count, 2) - 1)
    first = torch.stack([turn.cos() * mirror * across, -turn.sin() * across, centre[:, 0]], dim=1)
    second = torch.stack([turn.sin() * mirror * down, turn.cos() * down, centre[:, 1]], dim=1)
    theta = torch.stack([first, second], dim=1).to(image.device)  # (c, 2, 3)
    places = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    cut = F.grid_sample(
        image.expand(count, -1, -1, -1), places, mode="bilinear", padding_mode="border", align_corners=False
    )
    strength = _MOST_NOISE * random(count, 1, 1, 1)
    noise = torch.randn(*cut.shape, generator=generator, dtype=torch.float32, device="cpu")
    return cut + (strength * noise).to(image.device)


def _frozen(module: _Module) -> _Module:
    """A copy that computes no gradients of its weights and shares them, but for those of convolutions.

    These are channels last: a third of a step's time less on a CPU (0.29 for 0.44 s of one core at 128 pixels, not stored).
    """
    shared = {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in module.parameters()}
    copied = copy.deepcopy(module, shared)
    copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def _seed(seed: int, candidate: int) -> int:
    digest = hashlib.sha256(f"{seed} refinement of candidate {candidate}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
