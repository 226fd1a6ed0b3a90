"""Checks of the `deepspeed:` section: misspelt keys are found, documented ones pass, defaults that compute are written out."""

from typing import Any

import pytest
import yaml

from engine.errors import InputError
from engine.training.deepspeed_section import check_defaults, check_keys, unstated, with_defaults
from engine.training.engines import check_types
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
        check_defaults(section)


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


STATED: dict[str, Any] = {
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 9, "warmup_type": "linear", "cos_min_ratio": 0.1},
    },
}


@pytest.mark.parametrize(
    ("changes", "processes", "missing"),
    [
        ({}, 4, []),
        ({"gradient_clipping": None}, 1, ["gradient_clipping"]),
        ({"optimizer": {"type": "AdamW"}}, 1, ["optimizer.params.lr"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, 1, ["optimizer.params.adam_w_mode"]),
        (
            {"scheduler": {"type": "WarmupLR"}},
            1,
            ["scheduler.params.warmup_num_steps", "scheduler.params.warmup_type"],
        ),
        ({"scheduler": {"type": "OneCycle"}}, 1, []),
        (
            {"fp16": {"enabled": True}},
            1,
            ["fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis", "fp16.min_loss_scale"],
        ),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, 1, []),
        ({"bf16": {"enabled": True}}, 1, []),
        ({"bf16": {"enabled": True}}, 2, ["communication_data_type"]),
        ({"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}, 1, ["data_types.grad_accum_dtype"]),
    ],
)
def test_defaults_that_change_the_arithmetic_are_to_be_written_out(
    changes: dict[str, Any], processes: int, missing: list[str]
) -> None:
    settings = {name: value for name, value in (STATED | changes).items() if value is not None}
    assert [one.path for one in unstated(settings, processes=processes)] == missing
    if not missing:
        check_defaults(settings, processes=processes)
        return
    with pytest.raises(InputError, match=rf"deepspeed.{missing[0]}: \(nothing\): .*write it out") as found:
        check_defaults(settings, processes=processes)
    assert all(name in str(found.value) for name in missing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "AdamP"}}, "deepspeed.optimizer.type: AdamP: neither DeepSpeed nor torch.optim has it: use Adam"),
        ({"optimizer": {"type": "xyzzy"}}, "use AdamW, say"),
        ({"scheduler": {"type": "ReduceLROnPlateau"}}, "deepspeed.scheduler.type: ReduceLROnPlateau: waits for a validation loss"),
    ],
)  # fmt: skip
def test_what_the_ancestors_trained_with_and_is_not_here_is_named(settings: dict[str, Any], message: str) -> None:
    """KoDALLE's AdamP, and the plateaus of KoCLIP and DALL-E."""
    with pytest.raises(InputError, match=message):
        check_types(settings)


@pytest.mark.parametrize("name", ["AdamW", "adamw", "Lamb", "Muon", "RAdam", "SGD", None])
def test_deepspeeds_and_torchs_optimisers_pass(name: str | None) -> None:
    check_types({"optimizer": {"type": name} if name else {}, "scheduler": {"type": "WarmupLR"}})


def test_the_defaults_are_those_of_the_installed_deepspeed() -> None:
    """The values that the messages state, and that a resumed run is compared with."""
    import inspect

    from deepspeed.runtime import constants, lr_schedules
    from deepspeed.runtime.config import ADAM_W_MODE_DEFAULT
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    everything = with_defaults(
        {
            "optimizer": {"type": "Adam"},
            "scheduler": {"type": "WarmupCosineLR"},
            "fp16": {"enabled": True},
        }
    )
    assert everything["gradient_clipping"] == constants.GRADIENT_CLIPPING_DEFAULT
    assert everything["optimizer"]["params"]["adam_w_mode"] == ADAM_W_MODE_DEFAULT
    parameters = inspect.signature(lr_schedules.WarmupCosineLR).parameters
    assert everything["scheduler"]["params"] == {
        name: parameters[name].default for name in everything["scheduler"]["params"]
    }
    fp16 = DeepSpeedFP16Config(enabled=True)
    assert everything["fp16"] == {name: getattr(fp16, name) for name in everything["fp16"]}
