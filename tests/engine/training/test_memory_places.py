"""A training's numbers do not depend on where its buffers lie in memory: MKL's products alone would."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.forked import DEEPSPEED, run_forked
from tests.paths import REPOSITORY

_PLACES_BYTES = (4, 8, 16, 20, 32, 36, 48, 60)  # after a multiple of 64, where torch's own buffers begin


def _copied_to(place_bytes: int, tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 32, dtype=torch.float32, device="cpu")
    start = (-room.data_ptr() % 64 + place_bytes) // 4
    copy = room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert copy.data_ptr() % 64 == place_bytes
    return copy


def _places_with_other_bits() -> list[int]:
    """Where the scores of a small attention, 11 positions of 16 channels in 4 sequences, are not those at a multiple of 64."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, 11, 16, generator=generator, dtype=torch.float32, device="cpu")
    scores = {place: _copied_to(place, q) @ _copied_to(place, k).transpose(1, 2) for place in (0, *_PLACES_BYTES)}
    return [place for place in _PLACES_BYTES if not torch.equal(scores[place], scores[0])]


def _print_places(script: str) -> None:
    """In a process that started as the trainings do: DeepSpeed's launcher runs the script."""
    os.environ.pop("MKL_CBWR", None)
    if script:
        sys.argv = ["train.py", "--config", "no such file"]
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(script, run_name="__main__")
    print(_places_with_other_bits())


def test_products_are_the_same_wherever_their_operands_lie(tmp_path: Path) -> None:
    script = str(REPOSITORY / "engine" / "train.py")
    plain, training = run_forked([(_print_places, ("",)), (_print_places, (script,))], tmp_path, preload=DEEPSPEED)
    assert (plain[0], training[0]) == (0, 0), (plain[1], training[1])
    assert training[1].splitlines()[-1] == "[]"
    if plain[1].splitlines()[-1] == "[]":
        pytest.skip("here MKL's products do not depend on places without the training's setting either")
