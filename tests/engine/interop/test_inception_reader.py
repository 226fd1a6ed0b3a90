"""Weights of the FID network from files of torch.save: what is read, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.errors import InputError
from engine.interop.inception_reader import PUBLISHED_SHA256_START, read_inception
from engine.models.inception_v3 import InceptionV3
from engine.models.uninitialised import Uninitialised


def _state(*, counters: bool) -> dict[str, Tensor]:
    """Few stored numbers: each tensor repeats one."""
    with torch.device("meta"), Uninitialised():
        shapes = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    counted = {name: shape for name, shape in shapes.items() if counters or not name.endswith("num_batches_tracked")}
    return {
        name: torch.full((1,) * len(shape), 0.25 + number / 1000).expand(shape)
        for number, (name, shape) in enumerate(sorted(counted.items()))
    }


@pytest.mark.parametrize(("counters", "zipped"), [(False, True), (True, False)])
def test_every_tensor_is_the_files_own(tmp_path: Path, counters: bool, zipped: bool) -> None:
    state, path = _state(counters=counters), tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read_inception(path)
    own = found.network.state_dict()
    for name, value in state.items():
        assert name.endswith("num_batches_tracked") or torch.equal(own[name], value), name
    assert not found.network.training
    assert not any(parameter.requires_grad for parameter in found.network.parameters())
    assert (len(found.sha256), found.is_published) == (64, False)


def test_the_published_file_is_known_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save(_state(counters=False), path)
    sha256 = read_inception(path).sha256
    monkeypatch.setattr("engine.interop.inception_reader.PUBLISHED_SHA256_START", sha256[:8])
    assert read_inception(path).is_published
    assert PUBLISHED_SHA256_START == "6726825d"


def test_refused_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError, match=r"--inception: .*no such file: give the path"):
        read_inception(path)
    path.write_text("no weights", encoding="utf-8")
    with pytest.raises(InputError, match=r"is no file of torch\.save"):
        read_inception(path)
    torch.save({"model": print}, path)
    with pytest.raises(InputError, match="nothing of it was run"):
        read_inception(path)
    state = _state(counters=False)
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, path)
    with pytest.raises(InputError, match=r"fc.bias: missing: this kind of model has it, of shape \[1008\]"):
        read_inception(path)
    # torchvision's network of the same name
    torch.save(
        state | {"fc.weight": torch.zeros(1, 1).expand(1000, 2048), "fc.bias": torch.zeros(1).expand(1000)}, path
    )
    with pytest.raises(InputError, match=r"fc.bias: \[1000\]: the other tensors and the config require \[1008\]"):
        read_inception(path)
    torch.save(state | {"AuxLogits.fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(
        InputError, match=r"AuxLogits.fc.bias: \[1000\]: is a tensor that this kind of model does not have"
    ):
        read_inception(path)
    torch.save(state | {"fc.bias": torch.full((1,), torch.nan).expand(1008)}, path)
    with pytest.raises(InputError, match=r"fc\.bias: not finite"):
        read_inception(path)
