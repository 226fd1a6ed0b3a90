"""DeepSpeed's folders: the ranks' files together are what DeepSpeed's own tool makes of them; without them, a plain no."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import InputError
from engine.interop.deepspeed_folder import is_deepspeed_folder, open_deepspeed_folder
from engine.interop.importing import import_checkpoint
from engine.models.discrete_vae import DiscreteVae
from engine.models.folder import load_part
from tests.engine.interop.test_importing_codecs import DISCRETE, _codec

RANKS = 2
HPARAMS = {
    "image_size": 32, "num_layers": 2, "num_tokens": 30, "codebook_dim": 10, "hidden_dim": 12, "num_resnet_blocks": 1
}  # fmt: skip


def _pad(flat: Tensor, multiple: int) -> Tensor:
    return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


def _write(folder: Path, tensors: dict[str, Tensor], stage: int) -> None:
    """The files that DeepSpeed writes with two ranks and two groups of parameters, at a ZeRO stage; 0: without ZeRO."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    torch.save({"hparams": HPARAMS, "vae_params": None, "weights": "DeepSpeed"}, folder / "auxiliary.pt")
    names = sorted(tensors)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    shapes = [{name: tensors[name].shape for name in group} for group in groups]
    module = {name: value.half() for name, value in tensors.items()}
    common = {
        "param_shapes": shapes,
        "ds_version": "0.16.0",
        "buffer_names": [],
        "shared_params": {},
        "dp_world_size": RANKS,
    }
    if stage < 3:
        torch.save(common | {"module": module}, step / "mp_rank_00_model_states.pt")
    for rank in range(RANKS):
        if stage == 3:
            empty = {name: torch.zeros(0) for name in tensors}
            content: dict[str, Any] = common | {
                "module": empty,
                "frozen_param_shapes": None,
                "frozen_param_fragments": None,
            }
            torch.save(content, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = []
        for group in groups:
            if stage == 3:
                parts = [_pad(tensors[name].flatten(), RANKS).chunk(RANKS)[rank] for name in group]
                flat.append(torch.cat(parts))
            else:
                whole = torch.cat([tensors[name].flatten() for name in group])
                flat.append(_pad(whole, 2 * RANKS).chunk(RANKS)[rank].clone())
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": stage, "partition_count": RANKS, key: flat}
        if stage:
            torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_folder_is_one_model(stage: int, tmp_path: Path) -> None:
    codec: DiscreteVae = _codec(DISCRETE)
    tensors = codec.state_dict()
    _write(tmp_path / "ds", tensors, stage)
    found = import_checkpoint(tmp_path / "ds", tmp_path / "model")
    (tmp_path / "parent").mkdir()
    (tmp_path / "ds").rename(tmp_path / "parent" / "ds")
    assert import_checkpoint(tmp_path / "parent", tmp_path / "model").parts["vqgan"].config == DISCRETE
    assert found.parts["vqgan"].config == DISCRETE
    imported = load_part(tmp_path / "model", "vqgan").state_dict()
    for name, value in tensors.items():
        assert torch.equal(imported[name], value if stage else value.half().float()), name


@pytest.mark.parametrize("stage", [2, 3])
def test_it_is_what_deepspeeds_own_tool_makes(stage: int, tmp_path: Path) -> None:
    tool = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    _write(tmp_path / "ds", _codec(DISCRETE).state_dict(), stage)
    theirs = tool.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "ds"))
    ours = open_deepspeed_folder(tmp_path / "ds").weights
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name].read(), value) for name, value in theirs.items())


def test_settings_without_weights_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "ds", _codec(DISCRETE).state_dict(), 2)
    with pytest.raises(
        InputError, match="is the auxiliary file of a DeepSpeed checkpoint, which has settings and no weights"
    ):
        import_checkpoint(tmp_path / "ds" / "auxiliary.pt", tmp_path / "model")
    (tmp_path / "ds" / "global_step7").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="lacks the folder global_step7, which holds the weights"):
        import_checkpoint(tmp_path / "ds", tmp_path / "model")


def test_a_missing_rank_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "ds", _codec(DISCRETE).state_dict(), 2)
    (tmp_path / "ds" / "global_step7" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputError, match="holds 1 of the 2 ranks' files"):
        import_checkpoint(tmp_path / "ds", tmp_path / "model")


def test_latest_leads_nowhere_else(tmp_path: Path) -> None:
    _write(tmp_path / "ds", _codec(DISCRETE).state_dict(), 0)
    for name in ("../elsewhere", "..", "/etc"):
        (tmp_path / "ds" / "latest").write_text(name)
        with pytest.raises(InputError, match="which is no folder's name"):
            import_checkpoint(tmp_path / "ds", tmp_path / "model")
    assert is_deepspeed_folder(tmp_path / "ds")
    assert not is_deepspeed_folder(tmp_path)
