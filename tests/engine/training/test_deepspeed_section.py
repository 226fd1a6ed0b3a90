"""Misspelt keys of the `deepspeed:` section are found; every key of DeepSpeed's documentation passes."""

from typing import Any

import pytest
import yaml

from engine.errors import InputError
from engine.training.deepspeed_section import check_keys
from tests.paths import REPOSITORY

DOCUMENTED = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "amp",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "autotuning",
    "flops_profiler",
    "activation_checkpointing",
    "sparse_attention",
    "data_efficiency",
    "curriculum_learning",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comms_logger",
    "compression_training",
    "checkpoint",
    "data_types",
    "elasticity",
    "seq_parallel_communication_data_type",
    "disable_allgather",
    "memory_breakdown",
    "torch_autocast",
    "compile",
]


@pytest.mark.parametrize("key", DOCUMENTED)
def test_documented_keys_pass(key: str) -> None:
    check_keys({key: {}})


def test_our_configs_pass() -> None:
    texts = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob("configs/**/*.yaml")]
    sections = [yaml.safe_load(text)["deepspeed"] for text in texts if "\ndeepspeed:" in text]
    assert len(sections) >= 12
    for section in sections:
        check_keys(section)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_cliping": 1.0}, "deepspeed.gradient_cliping: 1.0: .*did you mean gradient_clipping?"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"optimizer": {"type": "AdamW", "parms": {"lr": 1}}}, "deepspeed.optimizer.parms: .*did you mean params?"),
        ({"scheduler": {"typ": "WarmupLR"}}, "deepspeed.scheduler.typ: 'WarmupLR': .*did you mean type?"),
        ({"xyzzy_qqq": 1}, "deepspeed.xyzzy_qqq: 1: DeepSpeed reads no such key: remove it"),
    ],
)
def test_misspelt_keys_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_keys(settings)
