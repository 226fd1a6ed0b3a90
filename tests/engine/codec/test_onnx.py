"""ONNX Runtime: the same outputs as torch, the explicit choice of backend, stale files refused."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.codec.codec import open_codec
from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import (
    NETWORKS,
    OnnxKoClip,
    OnnxNetwork,
    OnnxVqgan,
    onnx_file,
    open_koclip,
    open_vqgan,
)
from engine.codec.onnx_export import MEASUREMENT_FILE, export_model
from engine.codec.vqgan_decoder import FastDecoder
from engine.config.codec import CodecBackend, CodecConfig, DiscreteVaeConfig, OpenaiDvaeConfig, VqganConfig
from engine.config.ranker import KoclipConfig
from engine.errors import InputError
from engine.models.folder import Part, load_part, read_part, write_model_folder
from engine.models.folder_config import weights_digest
from engine.models.image_codec import build_codec
from engine.models.koclip import KoClip
from engine.models.vqgan import Vqgan
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline
from tests.conftest import VQGAN
from tests.forked import DEEPSPEED, run_forked

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]
CPU = torch.device("cpu")
FILES = {f"{name}.onnx" for name in NETWORKS} | {MEASUREMENT_FILE}


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copied")


def _pixels(generation: Generation) -> np.ndarray:
    """(n, S, S, 3), in the order of candidates."""
    ordered = sorted(generation.candidates, key=lambda one: one.candidate)
    return np.stack([np.asarray(one.image) for one in ordered])


def _tokens(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(32, (rows, 64), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- the same as torch


@pytest.mark.parametrize("rows", [1, 3, 5])
@torch.inference_mode()
def test_decoder_is_torchs(exported: Path, rows: int) -> None:
    vqgan: Vqgan = load_part(exported, "vqgan")
    tokens = _tokens(rows)
    expected = vqgan.decode(tokens)
    images = open_vqgan(exported, vqgan.config, CPU).decode(tokens)
    assert (images.shape, images.dtype) == ((rows, 3, 32, 32), torch.float32)
    assert expected.std() > 0.05  # images, not a flat grey that any decoder would get right
    assert (images - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("rows", "size", "positions"), [(1, 32, 12), (3, 40, 7), (5, 32, 1)])
@torch.inference_mode()
def test_encoders_are_torchs(exported: Path, rows: int, size: int, positions: int) -> None:
    koclip: KoClip = load_part(exported, "koclip")
    onnx = open_koclip(exported, koclip.config, CPU)
    generator = torch.Generator().manual_seed(rows)
    images = torch.rand(rows, 3, size, size, generator=generator)
    texts = torch.randint(2, 64, (rows, positions), generator=generator)
    texts[1:, positions // 2 :] = 1  # a row without padding, the others with
    assert (onnx.embed_images(images) - koclip.embed_images(images)).abs().max() <= 1e-5
    full = slice(0, 1) if positions == 1 else slice(None)  # a caption of padding alone has no embedding in either
    assert (onnx.embed_texts(texts[full]) - koclip.embed_texts(texts[full])).abs().max() <= 1e-5
    assert onnx.embed_images(images).shape == (rows, 16)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"token_similarity": True, "direction_projections": True}])
def test_an_efficientnet_lite0_is_torchs(
    options: dict[str, bool], run_tree: Callable[..., dict[str, Any]], tmp_path: Path, quick: None
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    sizes = {key: value for key, value in run_tree("koclip", tmp_path)["model"].items() if "image" not in key}
    koclip = KoClip.from_pretrained_encoders(
        KoclipConfig(**sizes, **options, image_size=48, image_encoder="efficientnet-lite0")
    ).train()
    images = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        koclip.embed_images(images)  # the running statistics of its features
    koclip.eval()
    write_model_folder(tmp_path / "model", {"koclip": Part(koclip.config, koclip.state_dict())}, card="")
    export_model(tmp_path / "model", tmp_path / "model")
    onnx = open_koclip(tmp_path / "model", koclip.config, CPU)
    expected = koclip.embed_images(images[:5])
    assert expected.std(0).max() > 1e-3
    assert (onnx.embed_images(images[:5]) - expected).abs().max() <= 1e-5
    texts = torch.randint(5, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    texts[1, 4:] = 1
    assert (onnx.embed_texts(texts) - koclip.embed_texts(texts)).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        OpenaiDvaeConfig(image_size=32, hidden_channels=8, decoder_channels=12, blocks_per_group=1, codebook_size=24),
        DiscreteVaeConfig(image_size=32, num_layers=2, hidden_channels=8, embed_dim=8, codebook_size=24),
        VqganConfig(**VQGAN | {"family": "gumbel-vqgan", "embed_dim": 16}),
    ],
    ids=lambda config: config.family,
)
def test_the_other_codec_families_are_torchs(config: CodecConfig, tmp_path: Path, quick: None) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    codec = build_codec(config).eval()
    write_model_folder(tmp_path / "model", {"vqgan": Part(config, codec.state_dict())}, card="")
    export_model(tmp_path / "model", tmp_path / "model")
    tokens = torch.randint(config.codebook_size, (5, config.image_seq_len))
    expected = codec.decode(tokens)
    opened = open_codec(tmp_path / "model", codec, None, backend="onnx", device=CPU).decoder
    assert expected.std() > 1e-3
    assert (opened.decode(tokens) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"0\.\.(23|31)"):
        opened.decode(torch.full_like(tokens, config.codebook_size))


@torch.inference_mode()
def test_images_are_batch_invariant(exported: Path) -> None:
    config = read_part(exported, "vqgan").config
    tokens = _tokens(5)
    onnx = open_vqgan(exported, config, CPU)  # type: ignore[arg-type]
    together = onnx.decode(tokens)
    for rows in (1, 2, 4):
        assert torch.equal(onnx.decode(tokens[:rows]), together[:rows])
    order = [3, 0, 4, 1, 2]
    assert torch.equal(onnx.decode(tokens[order]), together[order])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(open_vqgan(exported, config, CPU).decode(tokens), together)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


def test_refuses_what_torch_refuses(exported: Path) -> None:
    vqgan, koclip = load_part(exported, "vqgan"), load_part(exported, "koclip")
    decoders = [vqgan, open_vqgan(exported, vqgan.config, CPU)]
    for tokens in (_tokens(2)[:, :5], _tokens(2)[0], _tokens(2).float(), _tokens(2) + 32, _tokens(2) - 32):
        for decoder in decoders:
            with pytest.raises(ValueError, match="image tokens"):
                decoder.decode(tokens)
    assert torch.equal(decoders[1].decode(_tokens(2).int()), decoders[1].decode(_tokens(2)))
    for embedder in (koclip, open_koclip(exported, koclip.config, CPU)):
        for images in (torch.rand(2, 1, 32, 32), torch.rand(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
            with pytest.raises(ValueError, match="images must be"):
                embedder.embed_images(images)
        for texts in (torch.zeros(2, 12), torch.zeros(12, dtype=torch.int64), torch.full((1, 13), 5)):
            with pytest.raises(ValueError, match="text tokens"):
                embedder.embed_texts(texts)


# --------------------------------------------------------------------------------------------------- files refused


def _change_weights(folder: Path, part: str, name: str) -> None:
    weights = load_file(folder / f"{part}.safetensors")
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / f"{part}.safetensors")
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("part", "tensor", "file"),
    [("vqgan", "decoder.conv_out.weight", "vqgan_decoder"), ("koclip", "text_projection.fc.bias", "koclip_image")],
)
def test_stale_export_is_refused(copied: Path, part: str, tensor: str, file: str) -> None:
    _change_weights(copied, part, tensor)
    with pytest.raises(InputError, match=rf"{file}\.onnx: is stale, made from another {part} .*run `kodalle export`"):
        Pipeline.from_pretrained(copied, codec_backend="onnx")
    assert Pipeline.from_pretrained(copied, codec_backend="torch")(CAPTIONS[:1], candidates=1)


def test_weights_are_the_same_but_the_config_is_not(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["vqgan"]["norm_groups"] = 16  # no tensor changes with it, all images do
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"vqgan_decoder\.onnx: is stale"):
        Pipeline.from_pretrained(copied, codec_backend="onnx")


def test_missing_broken_and_foreign_files(copied: Path) -> None:
    file = onnx_file(copied, "vqgan_decoder")
    whole = file.read_bytes()
    for content, message in [
        (None, "is missing: run `kodalle export`"),
        (b"", "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"),
        (b"this is no model", "cannot be read"),
        (onnx_file(copied, "koclip_image").read_bytes(), "is no export of this engine's vqgan_decoder"),
    ]:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=rf"ONNX file: .*vqgan_decoder\.onnx: {message}") as caught:
            Pipeline.from_pretrained(copied, codec_backend="onnx")
        assert "\n" not in str(caught.value)


def test_missing_package_names_the_remedy(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"package onnxruntime: needed for .*install .*or use codec_backend=torch"):
        Pipeline.from_pretrained(exported, codec_backend="onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_no_cuda_is_reported(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = weights_digest(exported, "vqgan")
    path = onnx_file(exported, "vqgan_decoder")
    network = OnnxNetwork(path, "vqgan_decoder", source=source, device=torch.device("cuda:0"))
    assert network.provider == "CPUExecutionProvider"
    assert "note: onnxruntime has no working CUDA here, vqgan_decoder.onnx runs on the CPU" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- pipeline


def test_backend_is_an_explicit_choice(exported: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder in (model, exported):  # torch, whether there are ONNX files or not
        torchs = Pipeline.from_pretrained(folder)._codec
        assert (type(torchs.decoder), type(torchs.embedder)) == (FastDecoder, KoclipEncoder)
    onnxs = Pipeline.from_pretrained(exported, codec_backend="onnx")._codec
    assert (type(onnxs.decoder), type(onnxs.embedder)) == (OnnxVqgan, OnnxKoClip)
    assert capfd.readouterr().err == ""
    with pytest.raises(InputError, match="codec_backend: tensorrt: write torch or onnx"):
        Pipeline.from_pretrained(exported, codec_backend="tensorrt")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_int8_is_the_transformers_alone(exported: Path, backend: CodecBackend) -> None:
    plain, coarse = (Pipeline.from_pretrained(exported, codec_backend=backend, int8=int8) for int8 in (False, True))
    assert coarse.arithmetic.int8
    assert torch.equal(coarse.decode_images(_tokens(2)), plain.decode_images(_tokens(2)))


def test_torch_decodes_in_the_models_dtype(model: Path) -> None:
    vqgan = load_part(model, "vqgan").bfloat16()
    decoder, embedder = open_codec(model, vqgan, None, backend="torch", device=CPU)
    assert isinstance(decoder, FastDecoder)
    assert (decoder.precision, embedder) == ("bfloat16", None)


def test_same_images_as_torch_for_any_number_of_candidates(exported: Path) -> None:
    torchs = Pipeline.from_pretrained(exported, codec_backend="torch")(CAPTIONS, candidates=5, seed=3)
    pipeline = Pipeline.from_pretrained(exported, codec_backend="onnx")
    onnxs = pipeline(CAPTIONS, candidates=5, seed=3)
    for one, other in zip(onnxs, torchs, strict=True):
        difference = np.abs(_pixels(one).astype(int) - _pixels(other).astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
        scores = [{c.candidate: c.score for c in generation.candidates} for generation in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    few = pipeline(CAPTIONS[1:], candidates=2, seed=3)[0]
    assert np.array_equal(_pixels(few), _pixels(onnxs[1])[:2])
    low = Pipeline.from_pretrained(exported, codec_backend="onnx", dtype=torch.bfloat16)
    assert low(CAPTIONS[:1], candidates=1)[0].candidates[0].score is not None


def _hashes(model: Path) -> list[tuple[int, str]]:
    generation = Pipeline.from_pretrained(model, codec_backend="onnx")(CAPTIONS[:1], candidates=3, seed=4)[0]
    return [(one.candidate, hashlib.sha256(one.image.tobytes()).hexdigest()) for one in generation.candidates]


def _print_hashes(model: Path) -> None:
    torch.set_num_threads(1)
    print(_hashes(model))


@pytest.mark.slow
def test_same_images_in_another_process(exported: Path, tmp_path: Path) -> None:
    ((code, printed),) = run_forked([(_print_hashes, (exported,))], tmp_path, preload=DEEPSPEED)
    assert code == 0, printed
    assert printed.splitlines()[-1] == str(_hashes(exported))


def test_retrained_folder_has_no_export_left(copied: Path) -> None:
    """`write_model_folder` replaces a folder as a whole, so no file of an older model's export stays in it."""
    Pipeline.from_pretrained(copied, codec_backend="torch").save_pretrained(copied)
    assert not FILES & {path.name for path in copied.iterdir()}
