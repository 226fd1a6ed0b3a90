"""A model folder's VQGAN decoder and KoCLIP as ONNX files, for ONNX Runtime and for runtimes that are not Python.

    vqgan_decoder.onnx   image_tokens int64 (B, N)       -> images float32 (B, 3, S, S) in [0, 1]
    koclip_image.onnx    images float32 (B, 3, S, S)     -> embeddings float32 (B, E)
    koclip_text.onnx     text_tokens int64 (M, T)        -> embeddings float32 (M, E)

B, M and T are free, N, S and E are the config's. Weights are float32. Nothing is checked inside the graphs (tokens
outside the codebook) and pictures are not resized: that is the caller's, as in engine.codec.onnx_runtime.

Each file carries in its metadata which network it is and the digest of the config and weights that it was made from, so
that a file whose model was trained on since is told from a fresh one.

torch's older exporter (`dynamo=False`) on purpose. It needs the package `onnx` and nothing else, and takes seconds where
the newer one needs `onnxscript` too and takes minutes: 3 s against 49 s for a decoder of 0.2 million parameters, 7 s for
the published one of 42 million (two busy CPU cores, torch 2.13; errors against torch are the same).

Shapes: B pictures, N image tokens, S pixels, M captions, T text tokens, E width of the shared space.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.folder import PartName
from engine.models.koclip import PAD_TOKEN, KoClip
from engine.models.vqgan import Vqgan, to_unit_range

NetworkName = Literal["vqgan_decoder", "koclip_image", "koclip_text"]


class Network(NamedTuple):
    """What one file holds: the part of the model folder it comes from, the names of its input and its output."""

    part: PartName
    input: str
    output: str


NETWORKS: dict[NetworkName, Network] = {
    "vqgan_decoder": Network("vqgan", "image_tokens", "images"),
    "koclip_image": Network("koclip", "images", "embeddings"),
    "koclip_text": Network("koclip", "text_tokens", "embeddings"),
}
NETWORK_KEY, SOURCE_KEY = "kodalle_network", "kodalle_source"  # in an ONNX file's metadata_props
_OPSET = 17  # the first with LayerNormalization as one operation
_EXAMPLE_ROWS = 2  # one row would be taken for a constant by some operations


def onnx_file(folder: Path, name: NetworkName) -> Path:
    return folder / f"{name}.onnx"


def export_network(module: Vqgan | KoClip, name: NetworkName, path: Path, *, source: str) -> None:
    """Writes one network to `path`. Not atomic: the caller gives a temporary path.

    Args:
        module: the part that the network belongs to, float32, on the CPU, in eval mode.
        source: digest of config and weights (`engine.models.folder.weights_digest`), kept in the file's metadata.

    Raises:
        InputError: the package `onnx` is missing.
    """
    onnx = require("onnx", purpose="exporting", remedy="install it with `pip install onnx`")
    network = NETWORKS[name]
    axes = {network.input: {0: "rows"}, network.output: {0: "rows"}}
    if name == "koclip_text":
        axes[network.input][1] = "positions"
    wrapped, example = _wrapped(module, name)
    with warnings.catch_warnings(), torch.no_grad():
        # A dozen lines on constants that are constants indeed and on dynamo=False; what they fear would show in the
        # comparison with torch that follows every export (engine.codec.onnx_record).
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped.eval(),
            (example,),
            str(path),
            dynamo=False,
            input_names=[network.input],
            output_names=[network.output],
            dynamic_axes=axes,
            opset_version=_OPSET,
        )
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {NETWORK_KEY: name, SOURCE_KEY: source})
    onnx.save(written, str(path))


def require(package: str, *, purpose: str, remedy: str) -> Any:
    """An optional package, imported on use.

    Raises:
        InputError: it is missing, or installed and does not import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"package {package}", f"needed for {purpose}, does not import ({error})", remedy) from error


class _VqganDecoder(nn.Module):
    """`Vqgan.decode` without its checks, which a graph cannot hold."""

    def __init__(self, vqgan: Vqgan) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, image_tokens: Tensor) -> Tensor:
        grid = self.vqgan.config.grid_size
        entries = F.embedding(image_tokens, self.vqgan.quantize.embedding.weight)  # (B, N) -> (B, N, E)
        latents = entries.reshape(-1, grid, grid, entries.shape[-1]).permute(0, 3, 1, 2)  # (B, E, h, w)
        return to_unit_range(self.vqgan.decode_latents(latents))


class _KoClipImage(nn.Module):
    def __init__(self, koclip: KoClip) -> None:
        super().__init__()
        self.koclip = koclip

    def forward(self, images: Tensor) -> Tensor:
        return self.koclip.embed_images(images)


class _KoClipText(nn.Module):
    def __init__(self, koclip: KoClip) -> None:
        super().__init__()
        self.koclip = koclip

    def forward(self, text_tokens: Tensor) -> Tensor:
        return self.koclip.embed_texts(text_tokens)


def _wrapped(module: Vqgan | KoClip, name: NetworkName) -> tuple[nn.Module, Tensor]:
    """The network with one input and one output, and an example of its input."""
    rows = _EXAMPLE_ROWS
    if isinstance(module, Vqgan):
        return _VqganDecoder(module), torch.zeros(rows, module.config.image_seq_len, dtype=torch.int64)
    if name == "koclip_image":
        size = module.config.image_size
        return _KoClipImage(module), torch.full((rows, 3, size, size), 0.5)
    text_tokens = torch.full((rows, module.config.text_seq_len), PAD_TOKEN + 1)  # padded, or the mask would be left out
    text_tokens[0, -1] = PAD_TOKEN
    return _KoClipText(module), text_tokens
