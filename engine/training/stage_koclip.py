"""KoCLIP training: a batch is captioned images; the contrastive loss matches images and captions within it."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from engine.config.stages import KoclipRun
from engine.data.caption_fit import CaptionFit
from engine.data.near_central_crop import near_central_crop, without_uncropped
from engine.data.partial_captions import with_partial_captions
from engine.data.tokenizer import tokenizer_for
from engine.data.wrong_captions import wrong_captions
from engine.errors import InputError
from engine.metrics.retrieval import recall_at
from engine.models.folder import Part, load_part, write_model_folder
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KnownPairs, KoClip
from engine.models.koclip_objectives import KoClipWithObjectives, MaskedCaptions
from engine.pipeline.image_files import image_grid
from engine.training.batches import (
    Batch,
    BatchSource,
    Images,
    Reconstructions,
    captioned_image_source,
    read_pairs,
    to_device,
    to_unit_floats,
    training_order,
    validation_order,
)
from engine.training.engines import Engines, make_engine, micro_batch
from engine.training.objective_batches import objective_source
from engine.training.process_group import World
from engine.training.start_from import start_from
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights


class KoclipStage:
    """Training of a KoCLIP; see `engine.training.stage.Stage`."""

    name = "koclip"

    def __init__(self, run: KoclipRun, world: World) -> None:
        self.run, self.world = run, world
        pairs = read_pairs(run.data, run.seed)
        self.ground = pairs.ground
        batch_size, _ = micro_batch(run.deepspeed)
        if run.loss.image_ssl is not None and batch_size * world.size < 2:
            remedy = "loss.image_ssl compares images: give 2 or more"
            raise InputError("deepspeed.train_micro_batch_size_per_gpu", batch_size, remedy)
        captions = (caption for pair in pairs.train for caption in pair.captions)
        self.tokenizer = tokenizer_for(
            run.text, captions, table_rows=run.model.text_vocab_size, start_from=run.start_from
        )
        pairs = with_partial_captions(
            pairs, run.text.partial_captions, run.seed
        )  # the tokenizer is not trained on these
        wrong = wrong_captions([pair.captions[0] for pair in pairs.train]) if run.hard_negative_captions else None
        if run.hard_negative_captions and wrong is None:
            remedy = "the captions state no facts of which one could be changed: set it to 0"
            raise InputError("hard_negative_captions", run.hard_negative_captions, remedy)
        # Images are read at the encoder's size: they are resized once, in the loader.
        size, cache, length = run.model.image_size, run.data.cache_images, run.model.text_seq_len
        crop = near_central_crop(run.data.crop, size)
        pairs = without_uncropped(pairs, crop, note=world.note)
        self.num_train, self.num_validation = len(pairs.train), len(pairs.validation)
        reconstructions = None
        if run.codec is not None:
            vqgan: ImageCodec = load_part(run.codec, "vqgan").to(world.device)
            reconstructions = Reconstructions(
                pairs.train,
                size,
                codec_size=vqgan.config.image_size,
                reconstruct=lambda images: vqgan.decode(vqgan.encode(images.to(world.device))),
                crop=near_central_crop(run.data.crop, vqgan.config.image_size),
            )
        order = training_order(pairs.train, run.data, batch_size, seed=run.seed, world=world)
        images = Images(pairs.train, size, cache=cache, crop=crop)
        self.source: BatchSource = captioned_image_source(
            images,
            pairs.train,
            order,
            self.tokenizer,
            length,
            flip=run.data.flip,
            shift=run.augment_shift,
            reconstructions=reconstructions,
            spliced=run.spliced_negatives,
            bpe_dropout=self.tokenizer.dropout(run.text.bpe_dropout),
            fit=CaptionFit(pairs.train),
            wrong=wrong,
            num_wrong=run.hard_negative_captions,
        )
        if run.loss.has_objectives:
            self.source = objective_source(self.source, images, order, self.tokenizer, run.loss)
        self.validation_source: BatchSource | None = None
        if pairs.validation:
            held_out_order = validation_order(len(pairs.validation), batch_size, seed=run.seed, world=world)
            held_out = Images(pairs.validation, size, cache=cache, crop=crop, held_out=True)
            self.validation_source = captioned_image_source(
                held_out,
                pairs.validation,
                held_out_order,
                self.tokenizer,
                length,
                flip=False,
                fit=CaptionFit(pairs.validation),
            )

    def build(self, total_steps: int, guard: UpdateGuard) -> Engines:
        run, self._guard = self.run, guard
        model = KoClip.from_pretrained_encoders(
            run.model, text_encoder=run.pretrained_text_encoder, image_encoder=run.pretrained_image_encoder
        )
        if run.start_from is not None:
            start_from(model, run.model, run.start_from, "koclip")
        module = KoClipWithObjectives(model, run.loss) if run.loss.has_objectives else model
        self.engine = make_engine(
            module,
            run.deepspeed,
            total_steps=total_steps,
            parameters=_groups(module, run),
        )
        return {"koclip": self.engine}

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = to_unit_floats(batch["images"], self.world).contiguous(memory_format=torch.channels_last)
        negatives = to_unit_floats(batch["spliced"], self.world) if "spliced" in batch else None
        text_tokens = to_device(batch["text_tokens"], self.world.device)
        fits = to_device(batch["fits"], self.world.device)
        wrong, has_wrong = (
            to_device(batch[name], self.world.device) if name in batch else None
            for name in ("wrong_text_tokens", "has_wrong")
        )
        known, all_gather = KnownPairs(negatives, fits, wrong, has_wrong), self.world.size > 1
        if not self.run.loss.has_objectives:
            decoupled = self.run.loss.decoupled
            loss = self.engine(images, text_tokens, known=known, all_gather=all_gather, decoupled=decoupled)
            self._guard.backward_and_step(self.engine, loss)
            return {"loss": loss.detach()}
        views = to_unit_floats(batch["views"], self.world) if "views" in batch else None
        names = ("masked_tokens", "masked_positions", "masked_originals")
        tensors = [to_device(batch[name], self.world.device) for name in names if name in batch]
        masked = MaskedCaptions(*tensors) if tensors else None
        losses = self.engine(images, text_tokens, known=known, all_gather=all_gather, views=views, masked=masked)
        self._guard.backward_and_step(self.engine, losses.total)
        parts = {f"loss_{name}": value.detach() for name, value in losses._asdict().items() if value is not None}
        return {"loss": parts.pop("loss_total"), **parts}

    def after_step(self, step: int) -> bool:
        return False

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Loss, and recall@1/5 of the right caption among all different captions of the batches, at most 100."""
        module = self._module
        losses, images, texts, captions = [], [], [], []
        for batch in batches:
            image = module.embed_images(to_unit_floats(batch["images"], self.world))
            text = module.embed_texts(to_device(batch["text_tokens"], self.world.device))
            fits = to_device(batch["fits"], self.world.device)[:, self._own_columns(len(image))]
            losses.append(float(module.loss(image, text, fits=fits, decoupled=self.run.loss.decoupled)))
            images.append(image)
            texts.append(text)
            captions.append(batch["text_tokens"])
        recall = recall_at(
            module.caption_scores(torch.cat(images), torch.cat(texts)), torch.cat(captions), among=100, ranks=(1, 5)
        )
        values = {"loss": sum(losses) / len(losses)} | {f"recall_at_{rank}": share for rank, share in recall.items()}
        return {name: self.world.mean(value) for name, value in values.items()}

    @torch.no_grad()
    def sample(self, count: int) -> Image.Image:
        """One row a caption: the held-out images with the highest scores, best first."""
        source = self.validation_source or self.source
        batch = source(0)
        images = to_unit_floats(batch["images"], self.world)
        rows = min(count, len(images))
        scores = self._module.similarity(images, to_device(batch["text_tokens"][:rows], self.world.device))  # (rows, B)
        best = scores.topk(rows, dim=1).indices.cpu()
        return image_grid(images.cpu()[best.flatten()], columns=rows)

    def export(self, folder: Path, card: str) -> None:
        weights = full_weights(self.engine)
        if isinstance(self.engine.module, KoClipWithObjectives):  # what trains beside the KoCLIP stays behind
            prefix = "koclip."
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if self.world.is_main:
            write_model_folder(
                folder, {"koclip": Part(self.run.model, weights)}, card=card,
                tokenizer=self.tokenizer, ground=self.ground,
            )  # fmt: skip
        self.world.barrier()

    def _own_columns(self, batch_size: int) -> slice:
        """The columns of a batch's `fits` that are this rank's images."""
        return slice(self.world.rank * batch_size, (self.world.rank + 1) * batch_size)

    @property
    def _module(self) -> KoClip:
        return _koclip(self.engine.module)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


def _koclip(module: nn.Module) -> KoClip:
    """The KoCLIP that a training's module is or holds."""
    found = module.koclip if isinstance(module, KoClipWithObjectives) else module
    assert isinstance(found, KoClip), type(found)
    return found


def _groups(module: nn.Module, run: KoclipRun) -> list[dict[str, Any]]:
    """Parameter groups: projections (temperature, other objectives) at the learning rate, each encoder at its ratio of it.

    An encoder of ratio 0 is frozen: it requires no gradient from here on.
    """
    text_ratio = run.encoder_lr_ratio
    image_ratio = text_ratio if run.image_encoder_lr_ratio is None else run.image_encoder_lr_ratio
    scheduler = run.deepspeed.get("scheduler", {}).get("type")
    for field, ratio in (("encoder_lr_ratio", text_ratio), ("image_encoder_lr_ratio", image_ratio)):
        if ratio not in (0.0, 1.0) and scheduler not in (None, "WarmupCosineLR"):
            remedy = f"DeepSpeed's {scheduler} gives all groups one rate: use WarmupCosineLR, or ratio 1"
            raise InputError(field, ratio, remedy)
    model = _koclip(module)
    if image_ratio == 0:
        model.image_encoder.requires_grad_(False)
    ratios = {id(parameter): text_ratio for parameter in model.text_encoder.parameters()}
    ratios |= {id(parameter): image_ratio for parameter in model.image_encoder.parameters()}
    by_ratio: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in sorted(module.parameters(), key=lambda parameter: id(parameter) in ratios):  # encoders last
        if parameter.requires_grad:  # RoBERTa's unused pooler does not
            by_ratio.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    lr = float(run.deepspeed.get("optimizer", {}).get("params", {}).get("lr", 1e-3))
    return [{"params": parameters, "lr": lr * ratio} for ratio, parameters in by_ratio.items()]
