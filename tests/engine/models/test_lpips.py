"""LPIPS equals the paper's formula written out on its own, and weights are read by their public names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import InputError
from engine.models.lpips import Lpips, load_lpips

# torchvision's VGG16 up to relu5_3: convolution index -> (in, out), "pool" between, LPIPS layers end at these indices
PLAN: list[tuple[int, int, int] | str] = [
    (0, 3, 64),
    (2, 64, 64),
    "pool",
    (5, 64, 128),
    (7, 128, 128),
    "pool",
    (10, 128, 256),
    (12, 256, 256),
]
PLAN += [(14, 256, 256), "pool", (17, 256, 512), (19, 512, 512), (21, 512, 512), "pool"]
PLAN += [(24, 512, 512), (26, 512, 512), (28, 512, 512)]
TAPS = [2, 7, 14, 21, 28]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights under the names of torchvision's VGG16 and of LPIPS's vgg.pth."""
    generator = torch.Generator().manual_seed(0)
    named: dict[str, Tensor] = {}
    for step in PLAN:
        if not isinstance(step, str):
            index, inside, out = step
            scale = (2 / (9 * inside)) ** 0.5
            named[f"features.{index}.weight"] = torch.randn(out, inside, 3, 3, generator=generator) * scale
            named[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
    for layer, channels in enumerate((64, 128, 256, 512, 512)):
        named[f"lin{layer}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return named


def _lpips(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    def taps(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for step in PLAN:
            if isinstance(step, str):
                x = F.max_pool2d(x, 2, 2)
                continue
            x = torch.relu(
                F.conv2d(x, weights[f"features.{step[0]}.weight"], weights[f"features.{step[0]}.bias"], padding=1)
            )
            if step[0] in TAPS:
                found.append(x)
        return found

    total = torch.zeros(len(a), 1, 1, 1)
    for layer, (x, y) in enumerate(zip(taps(a), taps(b), strict=True)):
        x, y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        total += F.conv2d((x - y) ** 2, weights[f"lin{layer}.model.1.weight"]).mean((2, 3), keepdim=True)
    return total.flatten()


@pytest.fixture(scope="module")
def one_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "perceptual.safetensors"
    save_file(weights | {"classifier.0.weight": torch.zeros(2)}, path)
    return path


def test_size() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Lpips().parameters()) == 14_716_160


def test_equals_the_formula(weights: dict[str, Tensor], one_file: Path) -> None:
    perceptual = load_lpips(one_file)
    a, b = torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    a.requires_grad_()
    expected = _lpips(weights, a, b)
    distance = perceptual(a, b)
    torch.testing.assert_close(distance, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), a)[0] for value in (distance, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert perceptual(b, b).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_gradient_is_finite_where_nothing_fires() -> None:
    perceptual = Lpips()
    for convolution in perceptual.convolutions.values():
        torch.nn.init.zeros_(convolution.weight)  # type: ignore[arg-type]
        torch.nn.init.constant_(convolution.bias, -1.0)  # type: ignore[arg-type]
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    perceptual(images, torch.rand(1, 3, 16, 16)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_a_folder_with_two_pth_files(weights: dict[str, Tensor], one_file: Path, tmp_path: Path) -> None:
    torch.save({name: value for name, value in weights.items() if name.startswith("features")}, tmp_path / "vgg16.pth")
    torch.save({name: value for name, value in weights.items() if name.startswith("lin")}, tmp_path / "vgg.pth")
    (tmp_path / "README").write_text("not weights")
    expected = load_lpips(one_file).state_dict()
    loaded = load_lpips(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_names_inside_a_taming_checkpoint(weights: dict[str, Tensor], one_file: Path, tmp_path: Path) -> None:
    stages = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    theirs = {"decoder.conv_in.weight": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(1)}
    for name, value in weights.items():
        part, index, *rest = name.split(".")
        name = f"net.slice{stages[int(index)]}.{index}.{rest[0]}" if part == "features" else name
        theirs[f"loss.perceptual_loss.{name}"] = value
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "last.pth")
    expected = load_lpips(one_file).state_dict()
    loaded = load_lpips(tmp_path / "last.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_faults_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_lpips(path)
        assert str(tmp_path) in str(caught.value)

    with pytest.raises(InputError, match=r"set loss.perceptual_weights to .*, or loss.perceptual to another"):
        load_lpips(None)
    refused(tmp_path / "nothing.pth", "no such file")
    refused(tmp_path, "no such file, or a folder without")
    heads = {name: value for name, value in weights.items() if name.startswith("lin")}
    save_file(heads, tmp_path / "heads.safetensors")
    refused(tmp_path / "heads.safetensors", r"lacks `features.0.weight` \(26 tensors missing\)")
    save_file(weights | {"features.0.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    refused(tmp_path / "shape.safetensors", r"`features.0.bias` is \(3,\), VGG16 has \(64,\)")
    refused(tmp_path, "is there twice")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    refused(tmp_path / "broken.safetensors", "cannot be read as plain tensors")
    (tmp_path / "broken.pth").write_bytes(b"nonsense")
    refused(tmp_path / "broken.pth", "cannot be read as plain tensors")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_pickled_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_lpips(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out
