"""The kernels' benchmark: each case calls its kernel rightly and beside it does the same work in plain PyTorch."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.config.transformer import TransformerConfig
from tests.benchmark_scripts import run_script
from tests.paths import REPOSITORY

pytest.importorskip("triton")
SAMPLERS = ("sample", "head_sample")


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield


def test_published_sizes() -> None:
    from kernel_cases import PublishedSizes

    config = TransformerConfig()
    for name, value in dataclasses.asdict(PublishedSizes()).items():
        assert getattr(config, name) == value, name


def test_each_kernel_does_what_is_written_beside_it() -> None:
    from kernel_cases import PublishedSizes, Sizes, gpu_cases

    small = PublishedSizes(
        dim=64, num_heads=2, head_dim=16, ff_mult=2, image_vocab_size=512, image_seq_len=16, prefix_len=9
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.inference_mode():
        cases = {name: make() for name, make in gpu_cases(Sizes(small, 4, torch.float32, device)).items()}
        assert {case.kernel for case in cases.values()} == {
            "sample", "head_sample", "decode_attention", "guided_norm", "linear"
        }  # fmt: skip
        for name, case in cases.items():
            ours, plain = case.ours(), case.plain()
            if case.kernel in SAMPLERS:
                assert ours.shape == plain.shape == (4,), name
                assert int(plain.min()) >= 0, name
                assert int(plain.max()) < 512, name
            else:
                torch.testing.assert_close(ours, plain, rtol=2e-4, atol=2e-4, msg=partial("{}: {}".format, name))
            assert case.num_bytes > 0


def test_bytes_are_what_must_move() -> None:
    """The weights of the layer and the head at 16 bit, from performance figures worked out by hand."""
    from kernel_cases import PublishedSizes, Sizes, gpu_cases

    cases = gpu_cases(Sizes(PublishedSizes(), 1, torch.bfloat16, torch.device("cpu")))
    expected = {
        "linear qkv (norm)": 3.1e6, "linear out (residual)": 1.05e6, "linear grow (norm, gated)": 16.8e6,
        "linear shrink (residual)": 8.4e6, "head_sample": 33.6e6, "decode_attention": (129 + 127) * 2048,
    }  # fmt: skip
    for name, num_bytes in expected.items():
        assert cases[name]().num_bytes == pytest.approx(num_bytes, rel=0.02), name


def test_the_usual_sampling_keeps_what_its_filters_keep() -> None:
    from kernel_cases import sorted_sample

    torch.manual_seed(0)
    logits = torch.tensor([0.3, 0.25, 0.24, 0.11, 0.1]).log().repeat(2000, 1)
    assert set(sorted_sample(logits, 0, 1.0).tolist()) == {0, 1, 2, 3, 4}
    assert set(sorted_sample(logits, 3, 1.0).tolist()) == {0, 1, 2}
    assert set(sorted_sample(logits, 0, 0.5).tolist()) == {0, 1}
    assert set(sorted_sample(logits, 3, 0.35).tolist()) == {0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the table where there is no GPU")
def test_without_cuda(tmp_path: Path) -> None:
    answer = run_script("kernel_speed", "--out", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout.splitlines()[-1])
    (stored,) = (tmp_path / "results" / "kernel_speed").glob("*.json")
    assert json.loads(stored.read_text(encoding="utf-8")) == document
    measured = [row for row in document["rows"] if row["device"] == "cpu"]
    assert len(measured) == 3
    assert all(row["ours_us"] > 0 and row["eager_us"] > 0 for row in measured)
    kernels = [row for row in document["rows"] if row["device"] == "cuda"]
    assert len(kernels) == 9
    assert all(row["method"] == "not measured" and "ours_us" not in row for row in kernels)
