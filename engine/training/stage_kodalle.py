"""KoDALLE training: a batch is token ids; images are encoded once, into token shards, before the first step."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.config.stages import KodalleRun
from engine.data.class_tokenizer import conditioned_tokenizer
from engine.data.near_central_crop import near_central_crop, without_uncropped
from engine.data.pairs import Pairs, caption_guide
from engine.data.partial_captions import with_partial_captions
from engine.data.token_encoding import Encoding, begin_shards, encode_shards, finish_shards
from engine.data.token_shards import (
    AugmentedViews,
    TokenShards,
    captions_cut,
    check_shards,
    open_shards,
    shard_identity,
    shards_fault,
)
from engine.data.tokenizer import CaptionTokenizer, check_padding
from engine.decoding.sampler import Sampler
from engine.errors import InputError
from engine.folder_lock import hold_lock
from engine.models.folder import (
    Part,
    load_folder_tokenizer,
    load_own_ranker_tokenizer,
    load_part,
    read_part,
    write_model_folder,
)
from engine.models.folder_config import PartName, weights_digest
from engine.models.image_codec import ImageCodec
from engine.models.text_embeddings import apply_text_tables, load_text_tables
from engine.models.transformer import KoDalle, Losses
from engine.pipeline.image_files import image_grid
from engine.progress import ProgressBar
from engine.sampling_params import SequenceRequest
from engine.training.attention_choice import choose_attention
from engine.training.batches import (
    Batch,
    BatchSource,
    read_pairs,
    to_device,
    token_source,
    training_order,
    validation_order,
)
from engine.training.engines import Engines, is_muon, make_engine, micro_batch
from engine.training.muon import make_muon
from engine.training.order_annealing import batch_orders
from engine.training.parameter_groups import decayed_groups, parameter_kinds
from engine.training.process_group import World
from engine.training.resblock_scaling import make_resblock_scaling
from engine.training.start_from import start_from
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights, gathered_parameters


class KodalleStage:
    """Training of a KoDALLE transformer; see `engine.training.stage.Stage`."""

    name = "kodalle"

    def __init__(self, run: KodalleRun, world: World) -> None:
        self.run, self.world = run, world
        pairs = read_pairs(run.data, run.seed)
        self.ground = pairs.ground
        batch_size, _ = micro_batch(run.deepspeed)
        # A class that is only held out is one of the model's too.
        counted = pairs.all if run.model.condition == "class" else pairs.train
        captions = (caption for pair in counted for caption in pair.captions)
        self._caption_guide = caption_guide(pairs.train)
        self.tokenizer = conditioned_tokenizer(run.text, run.model, captions, start_from=run.start_from)
        pairs = with_partial_captions(
            pairs, run.text.partial_captions, run.seed
        )  # the tokenizer is not trained on these
        check_padding(self.tokenizer, run.model, field="text.tokenizer", value=run.text.tokenizer)
        self.vqgan: ImageCodec = load_part(run.vqgan, "vqgan")
        if run.koclip is not None:
            read_part(run.koclip, "koclip")  # fails now instead of at the export
            _check_same_tokenizer(run.koclip, self.tokenizer)
        self.vqgan.to(world.device).requires_grad_(False)
        self._crop = near_central_crop(run.data.crop, self.vqgan.config.image_size)
        pairs = without_uncropped(pairs, self._crop, note=world.note)
        self.num_train, self.num_validation = len(pairs.train), len(pairs.validation)
        if self.tokenizer.names_classes and run.caption_dropout > 0:
            raise InputError("caption_dropout", run.caption_dropout, "classes have no empty caption: write 0")
        nothing = torch.zeros(1, run.model.text_seq_len, dtype=torch.int64, device="cpu")  # not read then
        self._empty = nothing if self.tokenizer.names_classes else self.tokenizer.empty(run.model.text_seq_len)
        train, held_out = self._shards(pairs)
        order = training_order(pairs.train, run.data, batch_size, seed=run.seed, world=world)
        self.source: BatchSource = token_source(
            train, order, empty=self._empty, caption_dropout=run.caption_dropout,
            input_token_noise=run.input_token_noise, image_vocab_size=run.model.image_vocab_size,
            random_orders=run.order_annealing is not None, bpe_dropout=self.tokenizer.dropout(run.text.bpe_dropout),
        )  # fmt: skip
        self._sample_source = token_source(train, order, empty=self._empty, caption_dropout=run.caption_dropout)
        self.validation_source: BatchSource | None = None
        if held_out is not None:
            held_out_order = validation_order(len(held_out), batch_size, seed=run.seed, world=world)
            self.validation_source = token_source(held_out, held_out_order, empty=self._empty)
            self._sample_source = self.validation_source

    def build(self, total_steps: int, guard: UpdateGuard) -> Engines:
        run, self._guard = self.run, guard
        backend = choose_attention(run, self.world)
        model = KoDalle(run.model, embedding_std=run.embedding_std, attention_backend=backend)
        if run.codebook_init:
            model.start_from_codebook(self.vqgan.code_vectors().cpu())
        if run.pretrained_text_embeddings is not None:
            apply_text_tables(model, load_text_tables(run.pretrained_text_embeddings))
        if run.start_from is not None:
            start_from(model, run.model, run.start_from, "transformer")
        self._total_steps = total_steps
        self._scaling = (
            make_resblock_scaling(model, run.deepspeed, self.world) if run.resblock_gradient_scaling else None
        )
        kinds, decay_others = parameter_kinds(model), run.weight_decay_on == "all"
        optimizer = None
        if is_muon(run.deepspeed):
            optimizer = make_muon(*kinds, run.deepspeed["optimizer"]["params"], decay_others=decay_others)
        self.engine = make_engine(
            model, run.deepspeed, total_steps=total_steps, optimizer=optimizer,
            parameters=None if decay_others else decayed_groups(kinds),
        )  # fmt: skip
        return {"kodalle": self.engine}

    def micro_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        noisy, orders = batch.get("noisy_image_tokens"), None
        if self.run.order_annealing is not None:
            orders = batch_orders(batch, self.run.order_annealing, step=step, total_steps=self._total_steps)
        losses: Losses = self.engine(
            *self._tokens(batch),
            None if noisy is None else to_device(noisy, self.world.device),
            None if orders is None else to_device(orders, self.world.device),
            loss_image_weight=self.run.loss_image_weight,
        )
        self._guard.backward_and_step(self.engine, losses.loss)
        return {name: value.detach() for name, value in losses._asdict().items()}

    def after_step(self, step: int) -> bool:
        if self._scaling is not None:
            self._scaling.after_step(step)
        return False

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Means of the losses; `loss` is the image loss, since generation is given the caption."""
        totals: dict[str, float] = {}
        for batch in batches:
            losses: Losses = self.engine(*self._tokens(batch), loss_image_weight=self.run.loss_image_weight)
            for name, value in losses._asdict().items():
                totals[name] = totals.get(name, 0.0) + float(value)
        values = {name: self.world.mean(total / len(batches)) for name, total in totals.items()}
        return {**values, "loss": values["loss_image"], "loss_weighted": values["loss"]}

    @torch.no_grad()
    def sample(self, count: int) -> Image.Image:
        """Two rows: the VQGAN's reconstructions of held-out images, and images generated for their captions, seed 0."""
        batch = self._sample_source(0)
        text_tokens, image_tokens = (tokens[:count] for tokens in self._tokens(batch))
        params = self.run.generation.sampling_params().updated(guidance_scale=1)  # no empty caption here
        with gathered_parameters(self.engine):
            requests = [SequenceRequest(index, params, candidate=index) for index in range(len(text_tokens))]
            # Speculative decoding takes a varying number of passes, and ranks of ZeRO-3 must run equally many.
            generated = Sampler(self._module, weights="plain", speculative=False).generate(text_tokens, requests)
        return image_grid(
            torch.cat([self.vqgan.decode(image_tokens), self.vqgan.decode(generated)]), columns=len(text_tokens)
        )

    def export(self, folder: Path, card: str) -> None:
        """A complete model folder: transformer, the VQGAN that it was trained on, KoCLIP if there is one, tokenizer."""
        weights = full_weights(self.engine)
        if self.world.is_main:
            run = self.run
            parts: dict[PartName, Part] = {
                "vqgan": Part(
                    self.vqgan.config, self.vqgan.state_dict()
                ),  # not read again: the folder may hold a newer one
                "transformer": Part(run.model, weights),
            }
            ranker_tokenizer = None
            if run.koclip is not None:
                parts["koclip"] = read_part(run.koclip, "koclip")
                ranker_tokenizer = load_own_ranker_tokenizer(run.koclip)
            write_model_folder(
                folder, parts, card=card, tokenizer=self.tokenizer, ranker_tokenizer=ranker_tokenizer,
                generation=run.generation, caption_guide=self._caption_guide, ground=self.ground,
            )  # fmt: skip
        self.world.barrier()

    @property
    def _module(self) -> KoDalle:
        module = self.engine.module
        assert isinstance(module, KoDalle), type(module)
        return module

    def state(self) -> dict[str, Tensor]:
        return {} if self._scaling is None else self._scaling.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._scaling is not None:
            self._scaling.load_state(state)

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return to_device(batch["text_tokens"], self.world.device), to_device(batch["image_tokens"], self.world.device)

    def _shards(self, pairs: Pairs) -> tuple[TokenShards, TokenShards | None]:
        """Opens the token shards, after all ranks have encoded them where they are missing or made from other inputs."""
        run, model = self.run, self.run.model
        folder = run.token_shards or run.run / "shards"
        views = AugmentedViews(run.data.flip, run.augmented_views, run.augment_shift, run.data.crop)
        lock = hold_lock(folder.parent / f".{folder.name}.lock", field="token_shards", wait=True)
        with lock if self.world.is_main else contextlib.nullcontext():
            self._write_shards(pairs, folder, views)
        self.world.barrier()
        if self.world.local_rank == 0 and not self.world.is_main:
            check_shards(folder)  # a host may read a copy of its own
        cut = captions_cut(folder)
        if cut and run.strict_captions:
            raise InputError(
                "strict_captions", True, f"{len(cut)} images have captions of more than {model.text_seq_len} tokens, "
                f"the first is {min(cut)}: shorten them, or raise model.text_seq_len"
            )  # fmt: skip
        if cut and self.world.is_main:
            print(f"note: the captions of {len(cut)} images are too long and were cut: see {folder / 'shards.json'}")
        train, held_out = (
            open_shards(folder, split, image_vocab_size=model.image_vocab_size, text_vocab_size=model.text_vocab_size)
            if present
            else None
            for split, present in (("train", True), ("validation", bool(pairs.validation)))
        )
        assert train is not None
        return train, held_out

    def _write_shards(self, pairs: Pairs, folder: Path, views: AugmentedViews) -> None:
        length = self.run.model.text_seq_len
        plan: tuple[dict[str, Any], str | None] = ({}, None)
        if self.world.is_main:
            identity = shard_identity(
                pairs,
                self.tokenizer,
                vqgan_digest=weights_digest(self.run.vqgan, "vqgan"),
                text_seq_len=length,
                views=views,
            )
            plan = identity, shards_fault(folder, identity)
        identity, fault = self.world.share(plan)
        if fault is None:
            return
        encoding = Encoding(
            pairs,
            self.tokenizer,
            lambda images: self.vqgan.encode(images.to(self.world.device)),
            identity=identity,
            image_size=self.vqgan.config.image_size,
            text_seq_len=length,
            views=views,
            strict=self.run.strict_captions,
        )
        if self.world.is_main:
            if folder.exists():
                print(f"note: the token shards in {folder} {fault}: they are written anew", flush=True)
            begin_shards(folder, encoding)
        self.world.barrier()
        rank, size = self.world.rank, self.world.size
        with ProgressBar("encoding images", total=encoding.num_images(rank, size), enabled=self.world.is_main) as bar:
            encode_shards(folder, encoding, rank=rank, world_size=size, on_progress=lambda done, _: bar.update(done))
        self.world.barrier()
        if self.world.is_main:
            finish_shards(folder, encoding)


def _check_same_tokenizer(koclip: Path, tokenizer: CaptionTokenizer) -> None:
    """A model folder has one tokenizer, which transformer and KoCLIP share; a CLIP brings its own."""
    if load_own_ranker_tokenizer(koclip) is None and load_folder_tokenizer(koclip).digest != tokenizer.digest:
        raise InputError(
            "text.tokenizer", koclip, f"this KoCLIP was trained with another tokenizer: write text.tokenizer={koclip}"
        )
