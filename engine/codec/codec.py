"""The codec of a pipeline: what turns image tokens into images, and images and captions into embeddings.

    torch   this engine's own fast path (engine.codec.vqgan_decoder, engine.codec.koclip_encoder); the default
    onnx    files that `kodalle export` wrote, run by ONNX Runtime in float32 (engine.codec.onnx_backend)

The two differ by about 1e-5 of a pixel's range, a grey level here and there, so the backend is an explicit choice: the
same seed must give the same image in every process. benchmarks/codec_speed.py compares their speed.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import OnnxKoClip, OnnxVqgan, open_koclip, open_vqgan
from engine.codec.vqgan_decoder import FastDecoder, Precision, decodes_int8, fastest_precision
from engine.config.codec import CodecBackend, VqganConfig
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker


class Codec(NamedTuple):
    """Image decoder and embedder, each batch-invariant; `KoClip.scores` compares the embeddings."""

    decoder: FastDecoder | OnnxVqgan
    embedder: KoclipEncoder | OnnxKoClip | None

    @classmethod
    def of(cls, vqgan: ImageCodec, koclip: Ranker | None, *, int8: bool = False) -> "Codec":
        """The torch codec, in the models' dtype. It holds copies of the weights: build a new one after training on.

        Args:
            int8: the fastest decoding of a VQGAN on a CPU (`fastest_precision`): compiled float32, without a compiler 8-bit convolutions,
                or bfloat16; where there is none of them (a CPU without VNNI, another family of codec) the codec's dtype, which one
                line on stderr reports.

        Raises:
            InputError: `int8` on a GPU.
        """
        weight = next(vqgan.decoder.parameters())
        dtypes: dict[torch.dtype, Precision] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
        precision = dtypes.get(weight.dtype, "float32")
        if int8 and not isinstance(vqgan.config, VqganConfig):
            _report_no_int8(precision, f"which is not made for a codec of the family {vqgan.config.family}")
        elif int8 and weight.device.type == "cpu" and fastest_precision(vqgan) == "float32":
            precision = "float32"
        elif int8 and weight.device.type == "cpu" and not decodes_int8(weight.device):
            isa = cpu_capabilities().isa
            _report_no_int8(precision, f"which is slower on a processor without VNNI ({isa})")
        elif int8:
            precision = fastest_precision(vqgan)
        decoder = FastDecoder(vqgan, precision=precision)
        return cls(decoder, None if koclip is None else KoclipEncoder(koclip))


def open_codec(
    folder: Path,
    vqgan: ImageCodec,
    koclip: Ranker | None,
    *,
    backend: CodecBackend,
    device: torch.device,
    int8: bool = False,
) -> Codec:
    """The codec of a model folder.

    Args:
        folder: where the ONNX files are; not read by `torch`.
        vqgan, koclip: the folder's parts, in the dtype and on the device that `torch` computes in.
        device: where `onnx` runs.

    Raises:
        InputError: unknown backend; int8 with `onnx` or on a GPU; with `onnx`, what `OnnxNetwork` raises.
    """
    if backend == "torch":
        return Codec.of(vqgan, koclip, int8=int8)
    if backend != "onnx":
        raise InputError("codec_backend", backend, "write torch or onnx")
    if int8:
        raise InputError("codec_backend", backend, "has no int8: write torch, or leave int8 out")
    if not isinstance(koclip, KoClip | None):
        raise InputError("codec_backend", backend, f"has no ranker of the family {koclip.config.family}: write torch")
    embedder = None if koclip is None else open_koclip(folder, koclip.config, device)
    return Codec(open_vqgan(folder, vqgan.config, device), embedder)


@functools.cache
def _report_no_int8(precision: Precision, reason: str) -> None:
    print(f"codec: {precision} instead of int8, {reason}", file=sys.stderr)
