"""Networks without random weights: same names, shapes and computed buffers, and nothing drawn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.uninitialised import Uninitialised
from tests.conftest import KOCLIP, TRANSFORMER


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4) * torch.rand(4))
        self.linear = nn.Linear(4, 5)
        nn.init.trunc_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.places: Tensor
        self.register_buffer("places", torch.arange(6).view(2, 3))


def test_nothing_is_drawn_and_the_rest_is_computed() -> None:
    before = torch.get_rng_state()
    with Uninitialised():
        module = Noisy()
        KoClip(KoclipConfig(**KOCLIP))
        KoDalle(TransformerConfig(**TRANSFORMER))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module.linear.bias, torch.zeros(5))
    assert torch.equal(module.places, torch.arange(6).view(2, 3))


@pytest.mark.parametrize(
    "build", [lambda: KoClip(KoclipConfig(**KOCLIP)), lambda: KoDalle(TransformerConfig(**TRANSFORMER))]
)
def test_shapes_are_those_of_a_real_one(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"), Uninitialised():
        shapes = {name: value.shape for name, value in build().state_dict().items()}
    assert shapes == {name: value.shape for name, value in build().state_dict().items()}
