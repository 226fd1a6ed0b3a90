"""Chosen sizes as the configs of three trainings: ordinary YAML, with what `--set` changes in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.stages import DvaeRun, KoclipRun, KodalleRun, VqganRun
from engine.config_files import apply_override, parse_run, read_config_file
from engine.errors import InputError
from engine.files import read_json
from engine.training.plan.sizes import STAGES, Schedule, Sizes

Tree = dict[str, Any]
# A loss scale that follows the gradients, with DeepSpeed's defaults written out.
FP16 = {
    "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1,
}  # fmt: skip
AnyRun = VqganRun | DvaeRun | KoclipRun | KodalleRun  # what `parse_run` returns


def split_overrides(overrides: Sequence[str]) -> dict[str, list[str]]:
    """`stage.key=value` texts by stage.

    Raises:
        InputError: one that starts with no stage, or has no value.
    """
    found: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for text in overrides:
        stage, _, rest = text.partition(".")
        if stage not in found or "=" not in rest:
            raise InputError("--set", text, f"write stage.key=value, e.g. kodalle.loop.steps=4000; stages: {STAGES}")
        found[stage].append(rest)
    return found


def stated_steps(overrides: Sequence[str]) -> dict[str, int]:
    """Steps that `--set` states, by stage: other values follow from them, so they are known before the trees are made."""
    stated = {}
    for stage, texts in split_overrides(overrides).items():
        for text in texts:
            if text.startswith("loop.steps="):
                tree: Tree = {"loop": {}}
                apply_override(tree, text)
                steps = tree["loop"]["steps"]
                if not isinstance(steps, int) or steps < 1:
                    raise InputError("--set", f"{stage}.{text}", "give a whole number above 0")
                stated[stage] = steps
    return stated


@dataclass(frozen=True)
class Base:
    """A model to train on from: its folder and its config.json."""

    folder: Path
    config: Mapping[str, Any]


def read_base(folder: Path) -> Base:
    """A model folder to train on from.

    Raises:
        InputError: no model folder, or one without a VQGAN and a transformer.
    """
    config = read_json(folder / "config.json", field="--from", remedy="give a model folder, e.g. models/clothing")
    missing = [part for part in ("vqgan", "transformer") if part not in config]
    if missing:
        raise InputError("--from", folder, f"has no {' and no '.join(missing)}: give a folder with a whole model")
    return Base(folder, config)


def make_trees(
    sizes: Sizes, out: Path, pairs: Path, overrides: Sequence[str] = (), *, base: Base | None = None
) -> dict[str, Tree]:
    """The config of each stage, overrides applied; what follows from an earlier stage follows its overrides, too."""
    texts = split_overrides(overrides)
    trees: dict[str, Tree] = {"vqgan": _vqgan(sizes, out, pairs)}
    _start_from(trees["vqgan"], base, "vqgan")
    _apply(trees["vqgan"], texts["vqgan"])
    vqgan = trees["vqgan"]["model"]
    trees["koclip"] = _koclip(sizes, out, pairs, image_size=vqgan["image_size"])
    _start_from(trees["koclip"], base, "koclip")
    _apply(trees["koclip"], texts["koclip"])
    trees["kodalle"] = _kodalle(sizes, out, pairs, vqgan=vqgan, koclip=trees["koclip"]["model"])
    _start_from(trees["kodalle"], base, "transformer")
    _apply(trees["kodalle"], texts["kodalle"])
    return trees


def preset_trees(configs: Path, out: Path, pairs: Path, overrides: Sequence[str] = ()) -> dict[str, Tree]:
    """The configs of a folder, vqgan.yaml, koclip.yaml and kodalle.yaml, with the places of this run.

    Raises:
        InputError: one of them is missing or no YAML.
    """
    texts = split_overrides(overrides)
    trees = {}
    for stage in STAGES:
        tree = read_config_file(configs / f"{stage}.yaml", example=f"configs/demo/{stage}.yaml")
        tree["run"] = str(out / stage)
        tree.setdefault("data", {})["pairs"] = str(pairs)
        if stage == "koclip" and "codec" in tree:
            tree["codec"] = str(out / "vqgan" / "model")
        if stage == "kodalle":
            tree |= {name: str(out / name / "model") for name in ("vqgan", "koclip")}
            tree.setdefault("text", {})["tokenizer"] = str(out / "koclip" / "model")
        _apply(tree, texts[stage])
        trees[stage] = tree
    return trees


def parse_trees(trees: dict[str, Tree], source: str) -> dict[str, AnyRun]:
    """The trees, checked.

    Raises:
        InputError: an override that fits no field, by name.
    """
    return {stage: parse_run(trees[stage], source=f"{source}, {stage}") for stage in STAGES}


def _apply(tree: Tree, texts: Sequence[str]) -> None:
    for text in texts:
        apply_override(tree, text)


def _start_from(tree: Tree, base: Base | None, part: str) -> None:
    """Makes a stage start from a model: its sizes, its codes as they are, a third of the learning rate."""
    if base is None or part not in base.config:
        return
    grown = {name: tree["model"][name] for name in ("text_vocab_size",) if name in tree["model"]}
    tree["model"] = dict(base.config[part]) | grown
    tree["start_from"] = str(base.folder)
    rates = tree["deepspeed"]["optimizer"]["params"]
    rates |= {name: rates[name] / 3 for name in ("lr", "adam_lr") if name in rates}
    if part == "vqgan":
        tree["codebook_reset"] = {"start_step": 0, "reset_every": 0}
    if part == "transformer":
        tree["codebook_init"] = False


def _shared(stage: str, sizes: Sizes, out: Path, pairs: Path) -> Tree:
    return {
        "stage": stage,
        "run": str(out / stage),
        "seed": 1,
        "data": {"pairs": str(pairs), "num_workers": 0 if sizes.device == "cpu" else 4, "flip": sizes.flip},
    }


def _loop(sizes: Sizes, schedule: Schedule, *, validation_batches: int) -> Tree:
    """Ten validations and eight sample grids a run."""
    loop: Tree = {
        "steps": schedule.steps,
        "validate_every": max(1, schedule.steps // 10),
        "validation_batches": validation_batches,
        "sample_every": max(1, schedule.steps // 8),
        "sample_count": 8,
        "checkpoint_every": max(1, min(schedule.steps // 10, 1000)),
    }
    return loop | ({"torch_threads": sizes.threads} if sizes.device == "cpu" else {})


def _deepspeed(
    sizes: Sizes, schedule: Schedule, *, lr: float, betas: list[float], decay: float, least: float, bf16: bool = False
) -> Tree:
    optimizer: Tree = {"lr": lr, "betas": betas, "weight_decay": decay, "torch_adam": True}
    settings: Tree = {
        "train_micro_batch_size_per_gpu": max(1, schedule.batch // sizes.gpus),
        "optimizer": {"type": "AdamW", "params": optimizer | ({"fused": True} if sizes.device != "cpu" else {})},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_num_steps": max(2, min(100, schedule.steps // 20)),
                "warmup_type": "log",
                "cos_min_ratio": least,
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0 if sizes.device == "cpu" else 1},
    }
    if sizes.device == "cpu" and bf16:
        settings["bf16"] = {"enabled": True}
    if sizes.device != "cpu":
        settings |= {"bf16": {"enabled": True}} if sizes.has_bf16 else {"fp16": dict(FP16)}
        settings["communication_data_type"] = "fp32"
    return settings


def _vqgan(sizes: Sizes, out: Path, pairs: Path) -> Tree:
    schedule, small = sizes.schedules["vqgan"], sizes.device == "cpu"
    steps = schedule.steps
    tree = _shared("vqgan", sizes, out, pairs)
    tree["data"]["cache_images"] = small
    tree |= {
        "init": "residual",
        "model": {
            "image_size": sizes.image_size,
            "base_channels": sizes.base_channels,
            "channel_multipliers": list(sizes.levels),
            "num_res_blocks": 1 if small else 2,
            "attention_resolutions": [] if small else [16],
            "norm_groups": 4 if small else 32,
            "latent_channels": 64 if small else 256,
            "embed_dim": 32 if small else 64,
            "codebook_size": sizes.codebook_size,
            "legacy_commitment": False,
        },
        "loss": {
            "pixel": "l1+l2",
            "perceptual": "efficientnet-lite0",
            "perceptual_weight": 0.4,
            "perceptual_shift": 7 if sizes.image_size >= 64 else 0,
            "disc_weight": 0.3 if sizes.discriminator else 0.0,
            "disc_start": steps // 2,
            "feature_weight": 1.0 if sizes.discriminator else 0.0,
            "disc_channels": 48 if small else 64,
        },
        "codebook_reset": {"start_step": min(500, steps // 8), "reset_every": max(2, min(50, steps // 60))},
        "loop": _loop(sizes, schedule, validation_batches=64),
        "deepspeed": _deepspeed(
            sizes,
            schedule,
            lr=(5e-4 if sizes.discriminator else 1e-3) if small else 1e-4,
            betas=[0.5, 0.9] if sizes.discriminator else [0.9, 0.99],
            decay=0.0,
            least=0.03,
            bf16=sizes.bf16_on_cpu,
        ),
    }
    return tree


def _koclip(sizes: Sizes, out: Path, pairs: Path, *, image_size: int) -> Tree:
    schedule, large = sizes.schedules["koclip"], sizes.large_ranker
    tree = _shared("koclip", sizes, out, pairs)
    tree["data"]["cache_images"] = sizes.device == "cpu"
    text = (256, 4, 1024) if large else (128, 2, 256)
    tree |= {
        "text": {"tokenizer": "train", "vocab_size": sizes.text_vocab_size, "partial_captions": 1},
        "augment_shift": max(1, image_size // 16),
        "codec": str(out / "vqgan" / "model"),
        "spliced_negatives": 0.25,
        "hard_negative_captions": sizes.hard_negative_captions,
        "image_encoder_lr_ratio": 0.1,
        "model": {
            "image_size": min(224, image_size),
            "image_encoder": "efficientnet-lite0",
            "text_dim": text[0],
            "text_layers": text[1],
            "text_heads": 4,
            "text_ff_dim": text[2],
            "text_vocab_size": sizes.text_vocab_size,
            "text_seq_len": sizes.text_seq_len,
            "text_position_rows": sizes.text_seq_len + 2,
            "embed_dim": 256 if large else 64,
            "dropout": 0.1,
            "ranking": "contrast" if sizes.hard_negative_captions else "cosine",
        },
        "loop": _loop(sizes, schedule, validation_batches=8),
        "deepspeed": _deepspeed(
            sizes, schedule, lr=5e-4 if large else 1.5e-3, betas=[0.9, 0.98], decay=0.1, least=0.02
        ),
    }
    return tree


def _kodalle(sizes: Sizes, out: Path, pairs: Path, *, vqgan: Tree, koclip: Tree) -> Tree:
    schedule, model = sizes.schedules["kodalle"], sizes.transformer
    deepspeed = _deepspeed(
        sizes, schedule, lr=1e-3 if model.dim <= 256 else 4e-4, betas=[0.9, 0.98], decay=0.05, least=0.02
    )
    if sizes.small_transformer:
        deepspeed["optimizer"] = {
            "type": "Muon",
            "params": {"lr": 0.02, "adam_lr": 1e-3, "momentum": 0.95, "weight_decay": 0.05, "betas": [0.9, 0.98]},
        }
        deepspeed["zero_optimization"] = {"stage": 0}  # at 1 and 2 DeepSpeed would clip Muon's updates
    options = ("qk_norm", "zero_init_branches", "x0_scalars") if sizes.small_transformer else ()
    tree = _shared("kodalle", sizes, out, pairs)
    tree |= {
        "text": {"tokenizer": str(out / "koclip" / "model"), "partial_captions": 2},
        "vqgan": str(out / "vqgan" / "model"),
        "koclip": str(out / "koclip" / "model"),
        "embedding_std": 0.02,
        "codebook_init": True,
        "caption_dropout": 0.1,
        "input_token_noise": 0.4,
        "augmented_views": sizes.augmented_views,
        "augment_shift": max(1, sizes.image_size // 20) if sizes.augmented_views else 0,
        "generation": {"temperature": 0.7, "guidance_scale": 3.0},
        "weight_decay_on": "matrices" if sizes.small_transformer else "all",
        "model": {
            "dim": model.dim,
            "num_layers": model.layers,
            "num_heads": model.heads,
            "head_dim": model.head_dim,
            "ff_mult": model.ff_mult,
            "attention_dropout": model.dropout,
            "ff_dropout": model.dropout,
            "text_vocab_size": koclip["text_vocab_size"],
            "text_seq_len": koclip["text_seq_len"],
            "text_position_rows": koclip["text_seq_len"] + 1,
            "image_vocab_size": vqgan["codebook_size"],
            "image_grid_size": vqgan["image_size"] // 2 ** (len(vqgan["channel_multipliers"]) - 1),
            **dict.fromkeys(options, True),
        },
        "loop": _loop(sizes, schedule, validation_batches=16),
        "deepspeed": deepspeed,
    }
    return tree
