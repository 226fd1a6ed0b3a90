"""Tiny data, tiny configs and, once a session, tiny models trained on them through the real loop."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two processes share the cores

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which other libraries do too

import importlib.util
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.benchmark_scripts import signal_handlers_kept
from tests.paths import REPOSITORY

COLOURS = {
    "빨강": (220, 40, 40),
    "파랑": (40, 60, 220),
    "초록": (40, 180, 60),
    "노랑": (230, 210, 50),
    "하양": (240, 240, 240),
    "검정": (20, 20, 20),
}
SIZE = 32  # pixels
GROUND = "#dcdcd8"  # of cut-outs, as the tiny prepared folder's report claims
STEPS = 8

# What a tiny model of each stage is. One thread: sums in one order, so that runs can be compared bit by bit.
LOOP = {
    "steps": STEPS,
    "validate_every": 4,
    "validation_batches": 2,
    "sample_every": 8,
    "sample_count": 2,
    "checkpoint_every": 2,
    "torch_threads": 1,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0e-3, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_type": "log", "cos_min_ratio": 1.0e-4},
    },
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
}
VQGAN = {
    "image_size": SIZE,
    "base_channels": 32,
    "channel_multipliers": [1, 1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "latent_channels": 16,
    "embed_dim": 8,
    "codebook_size": 32,
}
DVAE = {"image_size": SIZE, "hidden_channels": 8, "decoder_channels": 8, "blocks_per_group": 1, "codebook_size": 32}
KOCLIP = {
    "image_size": SIZE,
    "image_width": 0.1,
    "image_depth": 0.1,
    "image_hidden_dim": 128,
    "text_vocab_size": 64,
    "text_seq_len": 12,
    "text_dim": 32,
    "text_layers": 1,
    "text_heads": 2,
    "text_ff_dim": 64,
    "text_position_rows": 14,
    "embed_dim": 16,
}
TRANSFORMER = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "attention_dropout": 0.1,
    "ff_dropout": 0.1,
    "text_vocab_size": 64,
    "text_seq_len": 12,
    "text_position_rows": 16,
    "image_vocab_size": 32,
    "image_grid_size": 8,
}

Tree = dict[str, Any]

# Fixtures that train models first: tests on them are none of `make test-fast`.
_TRAINING = {"vqgan_run", "dvae_run", "koclip_run", "kodalle_run", "kodalle_parts", "run_of", "tree_of", "train_tree"}
# Programs; Triton's interpreter, which takes a second for what a GPU does in microseconds; DeepSpeed, torchmetrics and
# ONNX, which take seconds to import.
_SLOW = (
    "tests/benchmarks/",
    "tests/kernels/",
    "tests/engine/training/",
    "tests/engine/codec/test_onnx",
    "tests/engine/decoding/test_graph_decoder",
    "tests/engine/metrics/test_evaluate",
)
# Tests that start servers, browsers or Ray, and wait for them.
_EXCLUSIVE = (
    "tests/serve/page/",
    "tests/serve/test_app.py",
    "tests/benchmarks/test_serve_two_hosts.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which every test is deselected are not imported either: Ray, browsers and Triton take seconds."""
    terms = str(config.getoption("markexpr")).split(" and ")
    if collection_path.suffix != ".py" or not collection_path.is_relative_to(REPOSITORY):
        return None
    name = collection_path.relative_to(REPOSITORY).as_posix()
    for mark, places in (("slow", _SLOW), ("exclusive", _EXCLUSIVE)):
        if f"not {mark}" in terms and name.startswith(places):
            return True
    if "exclusive" in terms and not name.startswith(_EXCLUSIVE):
        return "mark.exclusive" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(_SLOW) or _TRAINING & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if item.nodeid.startswith(_EXCLUSIVE):
            item.add_marker("exclusive")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Commands that a test calls set the process's signal handlers, and the process is every other test's too."""
    with signal_handlers_kept():
        return (yield)


def write_pairs(folder: Path) -> Path:
    """A prepared folder: a square of one colour on another, 24 to train on (some with two captions), 6 held out."""
    (folder / "images").mkdir(parents=True)
    names = list(COLOURS)
    lines = []
    for number in range(30):
        ground, square = names[number % 6], names[(number + 1 + number // 6) % 6]
        pixels = np.empty((SIZE, SIZE, 3), np.uint8)
        pixels[:] = COLOURS[ground]
        pixels[8:24, 8:24] = COLOURS[square]
        image = f"images/{number:02d}.png"
        Image.fromarray(pixels).save(folder / image)
        caption = f"{ground} 바탕에 {square} 네모"
        lines.append(
            {
                "key": f"{number:02d}",
                "image": image,
                "caption": caption,
                "captions": [caption, f"{square} 네모"] if number % 3 == 0 else [caption],
                "photo": f"{number:02d}",
                "split": "train" if number < 24 else "validation",
                "attributes": {"ground": ground},
            }
        )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps({"options": {"ground": GROUND}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="session")
def run_tree(pairs_folder: Path) -> Callable[..., Tree]:
    """`run_tree("vqgan", folder)`: a training config as YAML would hold it, to be changed at will."""

    def make(stage: str, run: Path, **more: Any) -> Tree:
        tree: Tree = {
            "stage": stage,
            "run": str(run),
            "seed": 3,
            "data": {"pairs": str(pairs_folder), "flip": stage != "kodalle"},
            "loop": dict(LOOP),
            "deepspeed": json.loads(json.dumps(DEEPSPEED)),
        }
        if stage == "vqgan":
            # The codebook starts at step 2, the discriminator joins at 3, unused entries are reset at 4 and 6.
            tree["loss"] = {"perceptual": "none", "disc_start": 3, "disc_channels": 8, "disc_layers": 1}
            tree["codebook_reset"] = {"start_step": 2, "reset_every": 2}
            tree["model"] = dict(VQGAN)
            tree["deepspeed"]["zero_optimization"] = {"stage": 2}
        elif stage == "dvae":
            # The temperature falls over the whole run, the rate and the weight of the divergence over half of it.
            tree |= {"model": dict(DVAE), "augment_shift": 2, "kl_weight": {"start": 0.0, "end": 6.6, "steps": 4}}
            tree["temperature"] = {"start": 1.0, "end": 0.0625}
            tree["lr_schedule"] = {"start": 1.0, "end": 0.1, "steps": 4}
            del tree["deepspeed"]["scheduler"]
            tree["deepspeed"]["zero_optimization"] = {"stage": 1}
        elif stage == "koclip":
            tree |= {"model": dict(KOCLIP), "augment_shift": 2, "encoder_lr_ratio": 0.8}
            tree["text"] = {"tokenizer": "train", "vocab_size": 60}
            tree["deepspeed"]["zero_optimization"] = {"stage": 1}
        else:
            tree |= {"model": dict(TRANSFORMER), "embedding_std": 0.02, "caption_dropout": 0.2}
            tree |= {"input_token_noise": 0.5, "codebook_init": True}
            tree["text"] = {"tokenizer": "train", "vocab_size": 60}
        return tree | more

    return make


@pytest.fixture(scope="session")
def train_tree(write_tree: Callable[[Tree, Path], Path]) -> Callable[[Tree], Path]:
    """Trains a config in this process; returns the model folder."""

    def run(tree: Tree) -> Path:
        from engine.config_files import load_run
        from engine.training import trainer as loop

        path = Path(tree["run"])
        measured = loop.matrix_peak
        loop.matrix_peak = lambda *_: 1e12  # 0.4 s a run, and what it measures is no test's matter
        try:
            return loop.train(load_run(write_tree(tree, path.with_name(f"{path.name}.yaml"))))
        finally:
            loop.matrix_peak = measured

    return run


@pytest.fixture(scope="session")
def write_tree() -> Callable[[Tree, Path], Path]:
    """A config as a file, as users give it."""

    def write(tree: Tree, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's finished runs lie: vqgan, dvae, koclip, kodalle. Read them, never write there."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def vqgan_run(runs: Path, run_tree: Callable[..., Tree], train_tree: Callable[[Tree], Path]) -> Path:
    train_tree(run_tree("vqgan", runs / "vqgan"))
    return runs / "vqgan"


@pytest.fixture(scope="session")
def dvae_run(runs: Path, run_tree: Callable[..., Tree], train_tree: Callable[[Tree], Path]) -> Path:
    train_tree(run_tree("dvae", runs / "dvae"))
    return runs / "dvae"


@pytest.fixture(scope="session")
def koclip_run(runs: Path, run_tree: Callable[..., Tree], train_tree: Callable[[Tree], Path]) -> Path:
    train_tree(run_tree("koclip", runs / "koclip"))
    return runs / "koclip"


@pytest.fixture(scope="session")
def kodalle_parts(vqgan_run: Path, koclip_run: Path) -> Tree:
    """The keys of a KoDALLE config that name its trained models."""
    model = str(koclip_run / "model")
    return {"vqgan": str(vqgan_run / "model"), "koclip": model, "text": {"tokenizer": model}}


@pytest.fixture(scope="session")
def kodalle_run(
    runs: Path, kodalle_parts: Tree, run_tree: Callable[..., Tree], train_tree: Callable[[Tree], Path]
) -> Path:
    train_tree(run_tree("kodalle", runs / "kodalle", **kodalle_parts))
    return runs / "kodalle"


@pytest.fixture(scope="session")
def run_of(vqgan_run: Path, dvae_run: Path, koclip_run: Path, kodalle_run: Path) -> dict[str, Path]:
    """The finished run of each stage."""
    return {"vqgan": vqgan_run, "dvae": dvae_run, "koclip": koclip_run, "kodalle": kodalle_run}


@pytest.fixture(scope="session")
def tree_of(run_tree: Callable[..., Tree], kodalle_parts: Tree) -> Callable[..., Tree]:
    """`run_tree`, KoDALLE standing on the session's VQGAN and KoCLIP."""

    def make(stage: str, run: Path, **more: Any) -> Tree:
        return run_tree(stage, run, **((kodalle_parts if stage == "kodalle" else {}) | more))

    return make


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[Tree]]:
    """The lines of log.jsonl without what depends on the clock."""

    def read(run: Path) -> list[Tree]:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        clock = ("images_per_s", "share_of_peak")
        return [{name: value for name, value in line.items() if name not in clock} for line in lines]

    return read


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path], None]:
    """Asserts that two model folders hold the same parts with the same bits."""
    import torch
    from safetensors.torch import load_file

    def check(one: Path, other: Path) -> None:
        names = sorted(path.name for path in one.glob("*.safetensors"))
        assert names == sorted(path.name for path in other.glob("*.safetensors"))
        assert names
        for name in names:
            ours, theirs = load_file(one / name), load_file(other / name)
            assert ours.keys() == theirs.keys()
            different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
            assert not different, (name, different)

    return check


# ------------------------------------------------------------------------------------------------------------ kernels

_HAS_CUDA = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(_HAS_CUDA, reason="kernels are compiled here, not interpreted")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not _HAS_CUDA, reason="no CUDA device")]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a kernel runs: interpreted on the CPU, or compiled on a GPU."""
    if request.param == "cpu" and importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot_in_a_fixed_order)
    return str(request.param)


def _dot_in_a_fixed_order(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
    """`tl.dot` of Triton's interpreter as a matrix unit computes it: each cell sums over K in one order.

    The interpreter calls numpy's matrix product, whose BLAS may take the last columns of a matrix by another kernel, in
    another order (OpenBLAS on AVX2: the last eight). A column's bits then follow the number of columns, and a kernel
    that promises bits free of the batch seems to break its promise.

    Args:
        a, b, d: (M, K), (K, N) and the accumulator (M, N), not of 8 bits.
    """
    from triton.runtime.interpreter import TensorHandle

    dtype = d.data.dtype
    left, right = a.data.astype(dtype), b.data.astype(dtype)
    product = np.zeros(d.data.shape, dtype)
    for k in range(left.shape[1]):
        product += left[:, k, None] * right[None, k]
    return TensorHandle(product + d.data, d.dtype.scalar)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Any]:
    """Loads a module of kernels/ once more, as it is where Triton is not installed."""

    def load(module: ModuleType) -> Any:
        monkeypatch.setitem(sys.modules, "triton", None)
        spec = importlib.util.spec_from_file_location("without_triton", str(module.__file__))
        assert spec is not None
        assert spec.loader is not None
        bare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bare)
        return bare

    return load
