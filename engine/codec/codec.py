"""The codec of a pipeline: what turns image tokens into images, and images and captions into embeddings.

    torch   this engine's own fast path (engine.codec.vqgan_decoder, engine.codec.koclip_encoder); the default
    onnx    files that `kodalle export` wrote, run by ONNX Runtime in float32 (engine.codec.onnx_backend)

The two differ by about 1e-5 of a pixel's range, a grey level here and there, so the backend is an explicit choice: the
same seed must give the same image in every process. benchmarks/codec_speed.py compares their speed.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import OnnxKoClip, OnnxVqgan, open_koclip, open_vqgan
from engine.codec.vqgan_decoder import FastDecoder, Precision
from engine.config.codec import CodecBackend
from engine.errors import InputError
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker


class Codec(NamedTuple):
    """Image decoder and embedder, each batch-invariant; `KoClip.scores` compares the embeddings."""

    decoder: FastDecoder | OnnxVqgan
    embedder: KoclipEncoder | OnnxKoClip | None

    @classmethod
    def of(cls, vqgan: ImageCodec, koclip: Ranker | None) -> "Codec":
        """The torch codec, in the models' dtype. It holds copies of the weights: build a new one after training on."""
        dtypes: dict[torch.dtype, Precision] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
        decoder = FastDecoder(vqgan, precision=dtypes.get(next(vqgan.decoder.parameters()).dtype, "float32"))
        return cls(decoder, None if koclip is None else KoclipEncoder(koclip))


def open_codec(
    folder: Path,
    vqgan: ImageCodec,
    koclip: Ranker | None,
    *,
    backend: CodecBackend,
    device: torch.device,
) -> Codec:
    """The codec of a model folder.

    Args:
        folder: where the ONNX files are; not read by `torch`.
        vqgan, koclip: the folder's parts, in the dtype and on the device that `torch` computes in.
        device: where `onnx` runs.

    Raises:
        InputError: unknown backend; with `onnx`, what `OnnxNetwork` raises.
    """
    if backend == "torch":
        return Codec.of(vqgan, koclip)
    if backend != "onnx":
        raise InputError("codec_backend", backend, "write torch or onnx")
    if not isinstance(koclip, KoClip | None):
        raise InputError("codec_backend", backend, f"has no ranker of the family {koclip.config.family}: write torch")
    embedder = None if koclip is None else open_koclip(folder, koclip.config, device)
    return Codec(open_vqgan(folder, vqgan.config, device), embedder)
