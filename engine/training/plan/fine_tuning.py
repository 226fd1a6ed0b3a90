"""The config of training a transformer alone further: its sizes, codec and ranker as they are, the recipe of minDALL-E's transfer learning.

kakaobrain/minDALL-E states AdamW 1e-4, betas 0.9 and 0.95, no decay, clipping at 4, 512 images a step, 8 epochs, cosine, fp16; the
batch is smaller here where the images are few. It released no code for captions, and the same recipe trains them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.transformer import TransformerConfig
from engine.config_files import apply_override
from engine.data.pairs import Pairs
from engine.errors import InputError
from engine.models.folder_config import read_generation
from engine.text import clean_text
from engine.training.plan.configs import FP16, Base, split_overrides
from engine.training.plan.facts import MachineFacts

EPOCHS, _BATCH, _LR, _BETAS, _CLIP = 8, 512, 1e-4, [0.9, 0.95], 4.0
_MICRO_BATCH = {"cpu": 4, "cuda": 16}  # images at once; gradients are summed up over the rest of the batch
_LEAST_STEPS = 4  # of an epoch
Tree = dict[str, Any]


def fine_tuning_tree(
    base: Base, out: Path, pairs_folder: Path, pairs: Pairs, machine: MachineFacts, overrides: Sequence[str] = ()
) -> Tree:
    """The config of a `kodalle` stage that starts from `base`, with its codec frozen.

    Args:
        overrides: `kodalle.key=value`; `kodalle.model.condition=class` or `nothing` turns a model of captions into one of classes, each
            distinct caption being one, or of images alone.

    Raises:
        InputError: an override of another stage; a model without a tokenizer.
    """
    by_stage = split_overrides(overrides)
    other = next((stage for stage, texts in by_stage.items() if texts and stage != "kodalle"), None)
    if other is not None:
        raise InputError("--set", f"{other}.{by_stage[other][0]}", f"{base.folder} is trained on as a kodalle alone")
    model = dict(base.config["transformer"])
    stated: Tree = {"model": {}}
    for text in by_stage["kodalle"]:
        if text.startswith("model.condition="):
            apply_override(stated, text)
    condition = stated["model"].get("condition", TransformerConfig.model_validate(model).condition)
    is_new_text = condition != model.get("condition", "text")
    if is_new_text:
        captions = {clean_text(caption).strip() for pair in pairs.all for caption in pair.captions}
        model |= {
            "text_vocab_size": len(captions) if condition == "class" else 1, "text_seq_len": 1, "text_position_rows": 1,
            "bos": False, "unique_padding": False,
        }  # fmt: skip
    elif not (base.folder / "tokenizer.json").is_file():
        raise InputError("--from", base.folder, "has no tokenizer: import it again with --tokenizer")
    batch = 1 << max(0, min(_BATCH, len(pairs.train) // _LEAST_STEPS).bit_length() - 1)
    micro = min(batch, _MICRO_BATCH[machine.device])
    is_gpu, generation = machine.device != "cpu", read_generation(base.folder)
    tree: Tree = {
        "stage": "kodalle",
        "run": str(out / "kodalle"),
        "data": {"pairs": str(pairs_folder), "num_workers": 4 if is_gpu else 0},
        "start_from": str(base.folder),
        "vqgan": str(base.folder),
        "koclip": str(base.folder) if "koclip" in base.config and not is_new_text else None,
        "text": {"tokenizer": "train" if is_new_text else str(base.folder)},
        "embedding_std": 0.02,
        "model": model | {"condition": condition},
        "generation": generation.model_dump(),
        "loop": {
            "epochs": EPOCHS,
            "validate_every": 100,
            "sample_every": 500,
            "sample_count": 4,
            "checkpoint_every": 500,
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": max(1, batch // micro // max(1, machine.gpus)),
            "gradient_clipping": _CLIP,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": _LR, "betas": _BETAS, "weight_decay": 0.0, "torch_adam": True},
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": "auto",
                    "warmup_num_steps": 2,
                    "warmup_type": "linear",
                    "cos_min_ratio": 0.0001,
                },
            },
            "zero_optimization": {"stage": 1 if is_gpu else 0},
        },
    }
    if is_gpu:
        tree["deepspeed"]["optimizer"]["params"]["fused"] = True
        tree["deepspeed"] |= {
            "fp16": dict(FP16), "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}
        }  # fmt: skip
    for text in by_stage["kodalle"]:
        apply_override(tree, text)
    return tree
