"""dVAE training: a batch is images and a seed for the noise of each; see `engine.models.dvae_loss` for what is minimised.

An image's noise is a function of (seed, visit), so that any number of ranks, and a resumed run, compute the same.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from engine.config.stages import DvaeRun
from engine.metrics.reconstruction import psnr_db, reconstruction_error
from engine.models.dvae_loss import DvaeLosses, dvae_losses, gumbel_noise
from engine.models.folder import Part, write_model_folder
from engine.models.openai_dvae import OpenaiDvae
from engine.models.quantiser import codebook_stats
from engine.pipeline.image_files import image_grid
from engine.training.batches import Batch, image_sources, read_croppable, to_unit_floats
from engine.training.engines import Engines, make_engine, micro_batch
from engine.training.process_group import World
from engine.training.start_from import start_from
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights, gathered_parameters


class DvaeStage:
    """Training of a dVAE; see `engine.training.stage.Stage`."""

    name = "dvae"

    def __init__(self, run: DvaeRun, world: World) -> None:
        self.run, self.world = run, world
        pairs = read_croppable(run.data, run.seed, image_size=run.model.image_size, world=world)
        self.ground = pairs.ground
        self.num_train, self.num_validation = len(pairs.train), len(pairs.validation)
        batch_size, _ = micro_batch(run.deepspeed)
        self.source, self.validation_source = image_sources(
            pairs, run.data, run.model.image_size, batch_size, seed=run.seed, world=world,
            shift=run.augment_shift, noise_seeds=True,
        )  # fmt: skip

    def build(self, total_steps: int, guard: UpdateGuard) -> Engines:
        run, self._total_steps, self._guard = self.run, total_steps, guard
        self.dvae = OpenaiDvae(run.model)
        if run.start_from is not None:
            start_from(self.dvae, run.model, run.start_from, "vqgan")
        self.engine = make_engine(_WithLoss(self.dvae), run.deepspeed, total_steps=total_steps)
        self._rates = [float(group["lr"]) for group in self.engine.basic_optimizer.param_groups]
        return {"dvae": self.engine}

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        run, grid = self.run, self.run.model.grid_size
        if run.lr_schedule is not None:
            factor = run.lr_schedule.value(step, total_steps=self._total_steps)
            for group, rate in zip(self.engine.basic_optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        temperature, kl_weight = (
            schedule.value(step, total_steps=self._total_steps) for schedule in (run.temperature, run.kl_weight)
        )
        images = to_unit_floats(batch["images"], self.world).contiguous(memory_format=torch.channels_last)
        noise = gumbel_noise(
            batch["noise_seeds"].tolist(), (run.model.codebook_size, grid, grid), self.world.device
        ).contiguous(memory_format=torch.channels_last)
        losses: DvaeLosses = self.engine(images, noise, temperature, kl_weight, run.least_scale)
        self._guard.backward_and_step(self.engine, losses.loss)
        stats = codebook_stats(losses.image_tokens, run.model.codebook_size)
        return {
            "loss": losses.loss.detach(), "nll": losses.nll, "kl": losses.kl,
            "temperature": torch.tensor(temperature, dtype=torch.float32),
            "kl_weight": torch.tensor(kl_weight, dtype=torch.float32),
            "codebook_usage": stats.usage, "codebook_perplexity": stats.perplexity,
        }  # fmt: skip

    def after_step(self, step: int) -> bool:
        return False

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Of codes without noise; `loss` is the reconstruction error, mean absolute difference of [0, 1] pixels."""
        with gathered_parameters(self.engine):
            found = reconstruction_error(self.dvae, (to_unit_floats(batch["images"], self.world) for batch in batches))
        mse = self.world.mean(found["mse"])
        return {
            "loss": self.world.mean(found["mae"]),
            "mse": mse,
            "psnr_db": psnr_db(mse),
            "codebook_usage": self.world.mean(found["codebook_used"]),
        }

    @torch.no_grad()
    def sample(self, count: int) -> Image.Image:
        """Two rows: held-out images and their reconstructions."""
        images = to_unit_floats((self.validation_source or self.source)(0)["images"][:count], self.world)
        with gathered_parameters(self.engine):
            reconstructions = self.dvae.decode(self.dvae.encode(images))
        return image_grid(torch.cat([images, reconstructions]), columns=len(images))

    def export(self, folder: Path, card: str) -> None:
        weights = {name.removeprefix("dvae."): value for name, value in full_weights(self.engine).items()}
        if self.world.is_main:
            write_model_folder(folder, {"vqgan": Part(self.run.model, weights)}, card=card, ground=self.ground)
        self.world.barrier()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class _WithLoss(nn.Module):
    """A dVAE whose forward ends with the loss: DeepSpeed runs the forward of the module that it was given."""

    def __init__(self, dvae: OpenaiDvae) -> None:
        super().__init__()
        self.dvae = dvae

    def forward(
        self, images: Tensor, noise: Tensor, temperature: float, kl_weight: float, least_scale: float
    ) -> DvaeLosses:
        """(B, 3, S, S) float in [0, 1], noise (B, K, h, w); see `dvae_losses`."""
        return dvae_losses(
            self.dvae, images, noise, temperature=temperature, kl_weight=kl_weight, least_scale=least_scale
        )
