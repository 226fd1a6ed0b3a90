"""ONNX files of a model folder, run by ONNX Runtime behind the calls of the torch modules.

    vqgan_decoder.onnx   image_tokens int64 (B, N)       -> images float32 (B, 3, S, S) in [0, 1]
    koclip_image.onnx    images float32 (B, 3, S, S)     -> embeddings float32 (B, E)
    koclip_text.onnx     text_tokens int64 (M, T)        -> embeddings float32 (M, E)

`OnnxVqgan.decode` stands for `Vqgan.decode`, `OnnxKoClip.embed_images` and `.embed_texts` for KoCLIP's: same shapes, same
errors, float32 whatever the dtype of the rest of the pipeline. onnxruntime is imported on use only.

Each file carries in its metadata which network it is and the digest of the config and weights that it was exported from,
so that a file is refused when its model has been trained since.

An image's bits do not depend on the rest of the batch, on its order or on the number of threads: verified on CPU with
ONNX Runtime 1.31, for a small decoder and for the published one, batches of 1 to 5, 1 and 2 threads. On a GPU the
settings below request as much (no TF32, no convolution algorithm chosen by timing), and every call decodes four images,
padded where there are fewer; that is not measured.

Shapes: B images, N image tokens, S pixels, M captions, T text tokens, E width of the shared space.
"""

import importlib
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.codec import CodecConfig
from engine.config.ranker import KoclipConfig
from engine.errors import InputError
from engine.models.folder_config import PartName, weights_digest

NetworkName = Literal["vqgan_decoder", "koclip_image", "koclip_text"]


class Network(NamedTuple):
    """What one file holds: the part of the model folder that it comes from, the names of its input and its output."""

    part: PartName
    input: str
    output: str


NETWORKS: dict[NetworkName, Network] = {
    "vqgan_decoder": Network("vqgan", "image_tokens", "images"),
    "koclip_image": Network("koclip", "images", "embeddings"),
    "koclip_text": Network("koclip", "text_tokens", "embeddings"),
}
NETWORK_KEY, SOURCE_KEY = "kodalle_network", "kodalle_source"  # in an ONNX file's metadata_props

# Images per call; on a GPU always as many: cuDNN picks a convolution's algorithm by the batch size, and the last bits with
# it. An image's place in the batch changes nothing.
IMAGES_PER_CALL = 4
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
_EXPORT_AGAIN = "run `kodalle export` on the model folder again, or use codec_backend=torch"


class OnnxNetwork:
    """An ONNX Runtime session of one exported file.

    Args:
        path: the file.
        name: the network that it must hold.
        source: digest that the file's config and weights must have (`weights_digest` of the model folder's part).
        device: where the pipeline runs. A GPU uses the CUDA provider; where that does not work the CPU runs the network,
            and a note on stderr says so.

    Raises:
        InputError: onnxruntime is missing, the file is missing, broken, of another network or of other weights.
    """

    def __init__(self, path: Path, name: NetworkName, *, source: str, device: torch.device) -> None:
        remedy = "install it with `pip install onnxruntime-gpu`, or use codec_backend=torch"
        runtime = require("onnxruntime", purpose="running exported networks", remedy=remedy)
        if not path.is_file():
            raise InputError("ONNX file", path, f"is missing: {_EXPORT_AGAIN}")
        self._session = _open(runtime, path, device)
        self._output = NETWORKS[name].output
        self._input = NETWORKS[name].input
        self.provider: str = self._session.get_providers()[0]
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get(NETWORK_KEY) != name:
            raise InputError("ONNX file", path, f"is no export of this engine's {name}: {_EXPORT_AGAIN}")
        if metadata.get(SOURCE_KEY) != source:
            part = NETWORKS[name].part
            raise InputError(
                "ONNX file", path, f"is stale, made from another {part} than the folder's: {_EXPORT_AGAIN}"
            )
        if device.type == "cuda" and self.provider != CUDA_PROVIDER:
            print(f"note: onnxruntime has no working CUDA here, {path.name} runs on the CPU", file=sys.stderr)

    def __call__(self, batch: Tensor) -> Tensor:
        """Runs the network on one input tensor; the output, float32, is on the device of `batch`."""
        (output,) = self._session.run([self._output], {self._input: batch.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(output).to(batch.device)


class OnnxVqgan:
    """The decoder of a VQGAN, or of another family of codecs."""

    def __init__(self, decoder: OnnxNetwork, config: CodecConfig) -> None:
        self._decoder, self._config = decoder, config

    def decode(self, image_tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens to images: (B, N) integers -> (B, 3, S, S) float32 in [0, 1].

        Args:
            grid: of larger images, which no exported network decodes.

        Raises:
            ValueError: a grid, wrong shape or type, or a token outside the codebook.
        """
        if grid is not None:
            raise ValueError(f"this network decodes its own size only, not {grid[0]} x {grid[1]} tokens")
        N, K = self._config.image_seq_len, self._config.codebook_size
        if image_tokens.dim() != 2 or image_tokens.shape[1] != N:
            raise ValueError(f"image tokens must be (B, {N}), got {tuple(image_tokens.shape)}")
        if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
            raise ValueError(f"image tokens must be integers, not {image_tokens.dtype}")
        image_tokens = image_tokens.long()
        if bool(((image_tokens < 0) | (image_tokens >= K)).any()):
            raise ValueError(f"image tokens must be in 0..{K - 1}, the codebook's entries")
        if len(image_tokens) == 0:
            size = self._config.image_size
            return torch.empty(0, 3, size, size, dtype=torch.float32, device=image_tokens.device)
        is_cpu = self._decoder.provider == CPU_PROVIDER
        missing = 0 if is_cpu else -len(image_tokens) % IMAGES_PER_CALL  # the last call is padded with copies
        padded = torch.cat([image_tokens, image_tokens[-1:].expand(missing, -1)])
        images = [self._decoder(part) for part in padded.split(IMAGES_PER_CALL)]
        return torch.cat(images)[: len(image_tokens)]


class OnnxKoClip:
    """Both encoders of a KoCLIP. `KoClip.scores`, one matrix product, computes scores from embeddings."""

    def __init__(self, image: OnnxNetwork, text: OnnxNetwork, config: KoclipConfig) -> None:
        self._image, self._text, self._config = image, text, config

    def embed_images(self, images: Tensor) -> Tensor:
        """Images to the shared space: (B, 3, any, any) float in [0, 1] -> (B, E) float32.

        Raises:
            ValueError: wrong shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        S = self._config.image_size
        images = images.float()
        if images.shape[2:] != (S, S):  # as KoCLIP does; outside the file, since ONNX resizes differently from torch
            images = F.interpolate(images, size=(S, S), mode="bilinear", align_corners=False, antialias=True)
        return self._image(images)

    def embed_texts(self, text_tokens: Tensor) -> Tensor:
        """Captions to the shared space: (M, T) integers, padded with 1 -> (M, E) float32.

        Raises:
            ValueError: wrong shape or type, or longer than the config's text_seq_len.
        """
        if text_tokens.dim() != 2 or text_tokens.is_floating_point():
            raise ValueError(f"text tokens must be (M, T) integers, got {tuple(text_tokens.shape)} {text_tokens.dtype}")
        if text_tokens.shape[1] > self._config.text_seq_len:
            raise ValueError(f"{text_tokens.shape[1]} text tokens, this KoCLIP takes {self._config.text_seq_len}")
        return self._text(text_tokens.long())


def onnx_file(folder: Path, name: NetworkName) -> Path:
    return folder / f"{name}.onnx"


def require(package: str, *, purpose: str, remedy: str) -> Any:
    """An optional package, imported on use.

    Raises:
        InputError: it is missing, or installed and does not import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"package {package}", f"needed for {purpose}, does not import ({error})", remedy) from error


def open_vqgan(folder: Path, config: CodecConfig, device: torch.device) -> OnnxVqgan:
    """The decoder exported into a model folder. Raises what `OnnxNetwork` raises."""
    return OnnxVqgan(_from_folder(folder, "vqgan_decoder", weights_digest(folder, "vqgan"), device), config)


def open_koclip(folder: Path, config: KoclipConfig, device: torch.device) -> OnnxKoClip:
    """The encoders exported into a model folder. Raises what `OnnxNetwork` raises."""
    source = weights_digest(folder, "koclip")
    image, text = (_from_folder(folder, name, source, device) for name in ("koclip_image", "koclip_text"))
    return OnnxKoClip(image, text, config)


def _from_folder(folder: Path, name: NetworkName, source: str, device: torch.device) -> OnnxNetwork:
    return OnnxNetwork(onnx_file(folder, name), name, source=source, device=device)


def _open(runtime: Any, path: Path, device: torch.device) -> Any:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3  # errors only: a bad file raises an exception, warnings are advice
    settings.use_deterministic_compute = True
    # Its threads would spin after each call, on the cores that torch's threads need.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [CPU_PROVIDER]
    if device.type == "cuda" and CUDA_PROVIDER in runtime.get_available_providers():
        # Full float32, and the same algorithm in each process (ONNX Runtime's defaults are TF32 and timing).
        number = torch.cuda.current_device() if device.index is None else device.index
        cuda = {"device_id": number, "use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
        providers.insert(0, (CUDA_PROVIDER, cuda))
    faults = runtime.capi.onnxruntime_pybind11_state
    try:
        return runtime.InferenceSession(str(path), settings, providers=providers)
    except (
        faults.InvalidProtobuf,
        faults.InvalidGraph,
        faults.InvalidArgument,
        faults.Fail,
        faults.NotImplemented,
    ) as e:
        reason = str(e).strip().splitlines()[0]
        raise InputError("ONNX file", path, f"cannot be read ({reason}): {_EXPORT_AGAIN}") from e
