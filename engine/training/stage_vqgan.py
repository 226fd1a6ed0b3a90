"""VQGAN training: a batch is images; generator and discriminator are two DeepSpeed engines with an optimiser each."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from engine.config.stages import VqganLossConfig, VqganRun
from engine.errors import InputError
from engine.models.folder import Part, read_part, write_model_folder
from engine.models.perceptual import PerceptualDistance, perceptual_from_config
from engine.models.quantiser import codebook_stats
from engine.models.vqgan import Vqgan, to_unit_range
from engine.models.vqgan_loss import build_discriminator, discriminator_active, discriminator_loss, generator_loss
from engine.pipeline.image_files import image_grid
from engine.training.batches import Batch, image_sources, read_croppable, to_unit_floats
from engine.training.engines import Engines, make_engine, micro_batch, zero_stage
from engine.training.process_group import World
from engine.training.start_from import start_from
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights, update_master

_CODING = ("encoder", "quant_conv", "quantize")  # what makes tokens of images


class VqganStage:
    """Training of a VQGAN; see `engine.training.stage.Stage`."""

    name = "vqgan"

    def __init__(self, run: VqganRun, world: World) -> None:
        self.run, self.world = run, world
        self.pairs = read_croppable(run.data, run.seed, image_size=run.model.image_size, world=world)
        self.ground = self.pairs.ground
        self.num_train, self.num_validation = len(self.pairs.train), len(self.pairs.validation)
        self._batch_size, _ = micro_batch(run.deepspeed)
        self.source, self.validation_source = image_sources(
            self.pairs, run.data, run.model.image_size, self._batch_size, seed=run.seed, world=world
        )
        self.perceptual = perceptual_from_config(run.loss, world.device)
        self._discriminating = run.loss.disc_weight > 0
        self._quantised = run.codebook_reset.start_step == 0
        if zero_stage(run.deepspeed) == 3:
            raise InputError(
                "deepspeed.zero_optimization.stage", 3, "splits the codebook, which is looked up whole: use 0, 1 or 2"
            )

    def build(self, total_steps: int, guard: UpdateGuard) -> Engines:
        run, self.total_steps, self._guard = self.run, total_steps, guard
        model = Vqgan(run.model, track_usage=run.codebook_reset.reset_every > 0)
        if run.start_from is not None:
            start_from(model, run.model, run.start_from, "vqgan")
        elif run.init == "residual":
            model.residual_init()
        if run.decoder_only:
            for name in _CODING:
                getattr(model, name).requires_grad_(False)
        self.vqgan = model
        self.engine = make_engine(_WithLoss(model), run.deepspeed, total_steps=total_steps)
        engines: Engines = {"generator": self.engine}
        if self._discriminating:
            discriminator = build_discriminator(run.loss)
            self.discriminator_engine = make_engine(discriminator, run.deepspeed, total_steps=total_steps)
            engines["discriminator"] = self.discriminator_engine
        return engines

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Forward, backward and (at accumulation boundaries) optimiser steps of one micro batch."""
        config = self.run.loss
        # Convolutions follow their input's layout: 1.4x faster on CPU, and what tensor cores want. The weights stay as
        # they are: DeepSpeed flattens and broadcasts them and refuses strided ones.
        images = to_unit_floats(batch["images"], self.world).contiguous(memory_format=torch.channels_last)
        start = self.run.codebook_reset.start_step
        if step == start > 0 and not self._quantised:
            self._set_codebook(step)
        self._quantised = step >= start
        discriminator = self.discriminator_engine.module if discriminator_active(step, config) else None
        if discriminator is not None:
            discriminator.requires_grad_(False)
        loss, scalars, reconstruction, image_tokens = self.engine(
            images, discriminator, step, config, self.perceptual, self._quantised
        )
        self._guard.backward_and_step(self.engine, loss)
        if discriminator is not None:
            discriminator.requires_grad_(True)
            d_loss, d_scalars = discriminator_loss(self.discriminator_engine, reconstruction, images)
            self._guard.backward_and_step(self.discriminator_engine, d_loss)
            scalars |= d_scalars
        if not self._quantised:
            return scalars
        stats = codebook_stats(image_tokens, self.run.model.codebook_size)
        return {**scalars, "codebook_usage": stats.usage, "codebook_perplexity": stats.perplexity}

    def after_step(self, step: int) -> bool:
        """Resets unused codebook entries every `reset_every` steps, in the first three quarters of the run.

        A reset entry changes what its token means, and the decoder needs the last quarter to adapt to the final ones.
        """
        reset = self.run.codebook_reset
        was_set = step == reset.start_step + 1 > 1  # by `_set_codebook`, before this step
        if reset.reset_every == 0 or step % reset.reset_every or not reset.start_step < step <= 0.75 * self.total_steps:
            return was_set
        self._guard.check()  # latents become entries below
        quantiser = self.vqgan.quantize
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + step)
        if not len(quantiser.reset_unused(generator)):
            return was_set
        update_master(self.engine, quantiser.embedding.weight)
        return True

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """`loss` is the reconstruction error: mean absolute difference of [0, 1] pixels."""
        totals: dict[str, float] = {"loss": 0.0, "mse": 0.0}
        tokens = []
        for batch in batches:
            images = to_unit_floats(batch["images"], self.world)
            reconstruction, _, image_tokens = self.vqgan(images, quantised=self._quantised)
            difference = to_unit_range(reconstruction) - images
            totals["loss"] += float(difference.abs().mean())
            totals["mse"] += float(difference.square().mean())
            tokens.append(image_tokens)
        means = {name: self.world.mean(total / len(batches)) for name, total in totals.items()}
        psnr_db = -10 * torch.log10(torch.tensor(means["mse"]).clamp_min(1e-10)).item()
        values = {**means, "psnr_db": psnr_db}
        if not self._quantised:  # no codec yet: 1 is more than any error, so that it is never the best
            return {**values, "loss": 1.0 + means["loss"]}
        stats = codebook_stats(torch.cat(tokens), self.run.model.codebook_size)
        return {**values, "codebook_usage": self.world.mean(float(stats.usage))}

    @torch.no_grad()
    def sample(self, count: int) -> Image.Image:
        """Two rows: held-out images and their reconstructions."""
        source = self.validation_source or self.source
        images = to_unit_floats(source(0)["images"][:count], self.world)
        reconstruction, _, _ = self.vqgan(images, quantised=self._quantised)
        return image_grid(torch.cat([images, to_unit_range(reconstruction)]), columns=len(images))

    def export(self, folder: Path, card: str) -> None:
        weights = {name.removeprefix("vqgan."): value for name, value in full_weights(self.engine).items()}
        if self.world.is_main:
            if self.run.decoder_only and self.run.start_from is not None:
                # In 16 bits DeepSpeed keeps no float32 copy of what is not trained, and rounded codes are other tokens.
                kept = read_part(self.run.start_from, "vqgan").weights
                weights |= {name: value for name, value in kept.items() if name.split(".")[0] in _CODING}
            write_model_folder(folder, {"vqgan": Part(self.run.model, weights)}, card=card, ground=self.ground)
        self.world.barrier()

    def state(self) -> dict[str, Tensor]:
        """Usage of the codebook entries, summed over ranks, because rank 0 alone writes it."""
        if not self.run.codebook_reset.reset_every:
            return {}
        state: dict[str, Tensor] = self.vqgan.quantize.usage_state()
        if self.world.size > 1:
            counts = state["usage_counts"].to(self.world.device)
            torch.distributed.all_reduce(counts)
            state["usage_counts"] = counts.cpu()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            if not self.world.is_main:  # rank 0 has the sum
                state = state | {"usage_counts": torch.zeros_like(state["usage_counts"])}
            self.vqgan.quantize.load_usage_state(state)

    @torch.no_grad()
    def _set_codebook(self, step: int) -> None:
        """Sets the codebook by k-means on the latents of the next images, when quantisation starts."""
        num_vectors = 8 * self.run.model.codebook_size  # eight an entry
        per_batch = self.run.model.image_seq_len * self._batch_size
        numbers = range(step, step + max(1, min(64, -(-num_vectors // per_batch))))
        latents = torch.cat(
            [self.vqgan.encode_latents(to_unit_floats(self.source(number)["images"], self.world)) for number in numbers]
        )
        generator = torch.Generator().manual_seed(self.run.seed)
        self.vqgan.quantize.init_from(latents, generator, kmeans_rounds=10)
        update_master(self.engine, self.vqgan.quantize.embedding.weight)


class _WithLoss(nn.Module):
    """A VQGAN whose forward ends with the generator's loss.

    The loss is weighted by gradients of its own parts. DeepSpeed hooks an engine's outputs and takes any
    differentiation through them for the backward pass (it raises at ZeRO stage 0), so this happens inside the module.
    """

    def __init__(self, vqgan: Vqgan) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(
        self,
        images: Tensor,
        discriminator: nn.Module | None,
        step: int,
        config: VqganLossConfig,
        perceptual: PerceptualDistance | None,
        quantised: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Loss, scalars to log, reconstruction (B, 3, S, S) without a graph, image tokens (B, N)."""
        reconstruction, quantiser_loss, image_tokens = self.vqgan(images, quantised=quantised)
        loss, scalars = generator_loss(
            discriminator,
            reconstruction,
            images,
            quantiser_loss,
            self.vqgan.last_layer_weight,
            step=step,
            config=config,
            perceptual=perceptual,
        )
        return loss, scalars, reconstruction.detach(), image_tokens
