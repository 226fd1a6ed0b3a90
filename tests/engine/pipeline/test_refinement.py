"""Refinement: gradients, the same bits again and in a batch, what stays, and a score that rises."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from engine.config.codec import DiscreteVaeConfig, VqganConfig
from engine.config.ranker import ClipConfig, KoclipConfig
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError
from engine.interop.clip_scorer import open_ranker
from engine.models.clip import Clip
from engine.models.discrete_vae import DiscreteVae
from engine.models.folder import Part, write_model_folder
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker
from engine.models.vqgan import Vqgan
from engine.pipeline.image_size import ImageSize
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.provenance import Refinement, read_provenance
from engine.pipeline.refinement import (
    GuidingRanker,
    _Seen,
    cut_outs,
    refine_generation,
    refine_tokens,
    straight_through,
)
from tests.conftest import KOCLIP, VQGAN

CAPTION = "빨강 바탕에 파랑 네모"
TEXT = torch.tensor([[0, 7, 8, 9, 2, 1, 1, 1]])
CLIP: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "image_dim": 24, "image_layers": 1, "image_heads": 3, "image_ff_dim": 32,
    "text_vocab_size": 60, "text_seq_len": 8, "text_dim": 24, "text_layers": 1, "text_heads": 3, "text_ff_dim": 32,
    "embed_dim": 16, "end_token": 2,
}  # fmt: skip


def _vqgan() -> Vqgan:
    torch.manual_seed(1)
    vqgan = Vqgan(VqganConfig(**VQGAN)).eval()
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)
    return vqgan


def _koclip() -> KoClip:
    torch.manual_seed(2)
    return KoClip(KoclipConfig(**KOCLIP)).eval()


def _tokens(codec: ImageCodec, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(codec.config.codebook_size, (count, codec.config.image_seq_len), generator=generator)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _refine(codec: ImageCodec, ranker: Ranker, tokens: Tensor, *, seeds: list[int], **options: Any) -> Tensor:
    refinement = Refinement(**{"steps": 4, "step_size": 0.3, "cut_outs": 3} | options.pop("refinement", {}))
    return refine_tokens(codec, ranker, tokens, TEXT, refinement, seeds=seeds, **options)


# ------------------------------------------------------------------------------------------------------- gradients


def test_straight_through_values_are_the_nearest_rows_and_gradients_those_of_the_vectors() -> None:
    table = torch.randn(40, 6, generator=_generator())
    latents = (table[:10] + 0.3 * torch.randn(10, 6, generator=_generator())).requires_grad_()
    values = straight_through(latents, table)
    nearest = (latents.detach()[:, None] - table).square().sum(2).argmin(1)
    assert torch.equal(values, table[nearest])
    weights = torch.randn(10, 6, generator=_generator())
    (gradient,) = torch.autograd.grad((values * weights).sum(), latents)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("kind", ["koclip", "clip"])
def test_the_gradient_is_that_of_the_score(kind: str) -> None:
    """Along its own direction, against a difference of two scores; straight through equals the gradient at the codes' vectors."""
    vqgan, ranker = _vqgan(), _koclip() if kind == "koclip" else Clip(ClipConfig(**CLIP)).eval()
    with torch.no_grad():
        vqgan.decoder.conv_out.weight.mul_(5)  # fresh images are nearly flat
    seen = _Seen(vqgan, ranker, TEXT, Refinement(steps=1, cut_outs=4), (8, 8))
    start = vqgan.latent_table()[_tokens(vqgan, 1)[0]]
    moved = (start + 1e-3).requires_grad_()
    (through,) = torch.autograd.grad(seen.score(moved, _generator()), moved)
    assert through.abs().max() > 0

    def score(latents: Tensor) -> Tensor:
        images = vqgan.to_images(vqgan.decoder(latents.view(1, 8, 8, -1).permute(0, 3, 1, 2)))
        cut = cut_outs(images, 4, _generator(), least_side=ranker.config.image_size)
        return ranker.scores(ranker.embed_pixels(ranker.prepare(cut)), ranker.embed_texts(TEXT)).mean()

    exact = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(exact), exact)
    torch.testing.assert_close(through, gradient, atol=1e-7, rtol=1e-3)
    if kind == "clip":  # a fresh KoCLIP's scores differ by less than float32 tells apart
        step = 0.1 * gradient / gradient.norm()
        with torch.no_grad():
            slope = (score(start + step) - score(start - step)) / 0.2
        assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.1)


def test_cut_outs_are_square_parts_of_the_image() -> None:
    """A ramp over an oblong image: each part rises by half to all of the shorter side's share, and stays inside."""
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 32, 96)
    parts = cut_outs(ramp, 64, _generator(), least_side=16)
    assert parts.shape == (64, 3, 32, 32)
    assert torch.equal(parts, cut_outs(ramp, 64, _generator(), least_side=16))
    assert cut_outs(ramp, 2, _generator(), least_side=48).shape == (2, 3, 48, 48)
    rows = parts.mean((1, 2))  # (64, 32), noise averaged away
    rises = (rows[:, -6:].mean(1) - rows[:, :6].mean(1)) * 32 / 26
    assert (rises.abs() < 1.15 / 3).all()
    assert (rises.abs() > 0.85 / 6).all()
    assert 10 < (rises > 0).sum() < 54  # mirrored or not
    assert rows.min() > -0.1
    assert rows.max() < 1.1
    assert rows.mean(1).std() > 0.1  # from anywhere
    flat = cut_outs(torch.full((1, 3, 32, 32), 0.5), 64, _generator(), least_side=32)
    assert torch.allclose(flat.mean(), torch.tensor(0.5), atol=0.01)
    assert 0.01 < flat.std() < 0.1


# ----------------------------------------------------------------------------------------------------- the same again


def test_alone_as_in_a_batch_with_any_number_of_threads() -> None:
    vqgan, koclip = _vqgan(), _koclip()
    tokens, threads = _tokens(vqgan, 3), torch.get_num_threads()
    together = _refine(vqgan, koclip, tokens, seeds=[1, 2, 3])
    assert not torch.equal(together, tokens)
    try:
        torch.set_num_threads(2)
        assert torch.equal(_refine(vqgan, koclip, tokens, seeds=[1, 2, 3]), together)
        for index in range(3):
            alone = _refine(vqgan, koclip, tokens[index : index + 1], seeds=[index + 1])
            assert torch.equal(alone[0], together[index])
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(_refine(vqgan, koclip, tokens, seeds=[4, 5, 6]), together)
    with torch.inference_mode():
        assert torch.equal(_refine(vqgan, koclip, tokens.clone(), seeds=[1, 2, 3]), together)
    assert all(parameter.grad is None for parameter in (*vqgan.parameters(), *koclip.parameters()))


def test_a_step_of_no_size_changes_nothing() -> None:
    vqgan = _vqgan()
    with torch.no_grad():
        vqgan.quantize.embedding.weight[1::2] = vqgan.quantize.embedding.weight[::2]  # each code twice
    tokens = _tokens(vqgan, 2)
    assert torch.equal(_refine(vqgan, _koclip(), tokens, seeds=[1, 2], refinement={"step_size": 0}), tokens)


def test_tokens_that_are_not_free_stay() -> None:
    vqgan = _vqgan()
    tokens, free = _tokens(vqgan, 1), torch.arange(64) % 2 == 0
    refined = _refine(vqgan, _koclip(), tokens, seeds=[1], free=free)
    assert torch.equal(refined[:, ~free], tokens[:, ~free])
    assert not torch.equal(refined[:, free], tokens[:, free])


def test_other_codecs_and_grids() -> None:
    torch.manual_seed(5)
    codec = DiscreteVae(
        DiscreteVaeConfig(image_size=32, num_layers=2, hidden_channels=8, embed_dim=6, codebook_size=30)
    )
    tokens = _tokens(codec.eval(), 1)
    assert not torch.equal(_refine(codec, _koclip(), tokens, seeds=[1]), tokens)
    vqgan = _vqgan()
    wide = _tokens(vqgan, 1).repeat(1, 2)[:, :96]
    assert _refine(vqgan, _koclip(), wide, seeds=[1], grid=(8, 12)).shape == (1, 96)


# ------------------------------------------------------------------------------------------------------ of a pipeline


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


def test_the_score_rises_and_provenance_says_how(pipeline: Pipeline) -> None:
    generation = pipeline([CAPTION], candidates=3, seed=5)[0]
    steps: list[tuple[int, int]] = []
    refinement = Refinement(steps=12, step_size=0.3, cut_outs=4)
    refined = refine_generation(pipeline, generation, refinement, count=2, on_step=lambda *counts: steps.append(counts))
    assert steps == [(done, 24) for done in range(1, 25)]
    before = {one.candidate: one for one in generation.top(2)}
    assert {one.candidate for one in refined.candidates} == before.keys()
    rises = [one.score - before[one.candidate].score for one in refined.candidates]  # type: ignore[operator]
    assert sum(rises) > 0
    assert all(one.image_tokens != before[one.candidate].image_tokens for one in refined.candidates)
    assert [one.rank for one in refined.candidates] == [1, 2]
    images = pipeline.decode_images(torch.tensor([one.image_tokens for one in refined.candidates]))
    for one, image in zip(refined.candidates, images, strict=True):
        assert np.array_equal(np.asarray(one.image), (image * 255).round().byte().permute(1, 2, 0).numpy())
    tree = pipeline.provenance(refined.request, 0)
    assert read_provenance(tree, source="file").refinement == refinement
    assert tree | {"refinement": None} == pipeline.provenance(generation.request, 0)
    still = refine_generation(pipeline, generation, Refinement(steps=2, step_size=0, cut_outs=1))
    assert [(one.image_tokens, one.score) for one in still.candidates] == [
        (one.image_tokens, one.score) for one in generation.candidates
    ]


def test_what_an_init_image_keeps_stays(pipeline: Pipeline) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    generation = pipeline([CAPTION], candidates=1, seed=5, init_image=InitImage(photo, keep_rows=4))[0]
    refined = refine_generation(pipeline, generation, Refinement(steps=3, step_size=0.5, cut_outs=2))
    (before,), (after,) = generation.candidates, refined.candidates
    assert before.image_tokens[:32] == after.image_tokens[:32]
    assert before.image_tokens[32:] != after.image_tokens[32:]
    assert np.array_equal(np.asarray(after.image)[:16], np.asarray(photo)[:16])


def test_larger_images_are_refined_as_a_whole(pipeline: Pipeline) -> None:
    generation = pipeline([CAPTION], candidates=1, seed=5, size=ImageSize(48, 32))[0]
    (refined,) = refine_generation(pipeline, generation, Refinement(steps=3, step_size=0.5, cut_outs=2)).candidates
    assert refined.image.size == (48, 32)
    assert refined.image_tokens != generation.candidates[0].image_tokens


def test_another_ranker_guides(pipeline: Pipeline, tmp_path: Path) -> None:
    """A CLIP with a tokenizer of its own, from a folder that holds nothing else; a model without a ranker takes it too."""
    torch.manual_seed(6)
    clip, tokenizer = Clip(ClipConfig(**CLIP)), train_tokenizer([CAPTION], vocab_size=60)
    write_model_folder(
        tmp_path / "clip", {"koclip": Part(clip.config, clip.state_dict())}, card="", ranker_tokenizer=tokenizer
    )
    guide = GuidingRanker(*open_ranker(tmp_path / "clip", field="--refine-with"))
    generation, refinement = (
        pipeline([CAPTION], candidates=1, seed=5)[0],
        Refinement(steps=3, step_size=0.5, cut_outs=2),
    )
    refined = refine_generation(pipeline, generation, refinement, guide=guide)
    own = refine_generation(pipeline, generation, refinement)
    assert refined.candidates[0].image_tokens != own.candidates[0].image_tokens
    assert refined.request.refinement == refinement.model_copy(update={"ranker_digest": guide.digest})
    unranked = Pipeline(pipeline.transformer, pipeline.vqgan, None, pipeline.tokenizer)
    with pytest.raises(InputError, match=r"refine: \(no ranker\): this model has none: give the folder of one"):
        refine_generation(unranked, generation, refinement)
    same = refine_generation(unranked, generation, refinement, guide=guide).candidates[0]
    assert (same.image_tokens, same.score) == (refined.candidates[0].image_tokens, None)
    write_model_folder(tmp_path / "no", {}, card="")
    with pytest.raises(InputError, match=r"--refine-with: .*no: holds no CLIP: give a folder of"):
        open_ranker(tmp_path / "no", field="--refine-with")


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 1, "step_size": -1}, {"steps": 1, "cut_outs": 0}, {}])
def test_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Refinement(**values)
