"""`kodalle export`: a model folder's VQGAN decoder and KoCLIP as ONNX files, compared with torch and timed beside it.

The files are for `codec_backend="onnx"` (engine.codec.onnx_backend, which describes them) and for runtimes that are not
Python. B, M and T are free in the graphs, the other sizes are the config's, weights are float32. The graphs check nothing
(tokens outside the codebook) and do not resize images: that is the caller's, as in engine.codec.onnx_backend.

What the comparison measured is stored beside them in `onnx.json` for people to read; nothing in the engine follows it.

torch's older exporter (`dynamo=False`) on purpose. It needs the package `onnx` and nothing else, and takes seconds where
the newer one needs `onnxscript` too and takes minutes: 3 s against 49 s for a decoder of 0.2 million parameters, 7 s for
the published one of 42 million (two busy CPU cores, torch 2.13; errors against torch are the same).

Shapes: B images, N image tokens, S pixels, M captions, T text tokens, E width of the shared space.
"""

import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import (
    IMAGES_PER_CALL,
    NETWORK_KEY,
    NETWORKS,
    SOURCE_KEY,
    NetworkName,
    OnnxKoClip,
    OnnxNetwork,
    OnnxVqgan,
    onnx_file,
    require,
)
from engine.codec.vqgan_decoder import FastDecoder
from engine.errors import InputError
from engine.facts import facts
from engine.files import atomic_file, write_json
from engine.measure import synchronize
from engine.models.folder import load_part
from engine.models.folder_config import PartName, has_part, weights_digest
from engine.models.image_codec import ImageCodec
from engine.models.koclip import KoClip
from engine.models.roberta import PAD_TOKEN
from engine.models.vqgan import Vqgan, to_unit_range
from engine.progress import ProgressBar

MEASUREMENT_FILE = "onnx.json"
_OPSET = 17  # the first with LayerNormalization as one operation
_EXAMPLE_ROWS = 2  # some operations would take a batch of one for a constant
_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_S = 3, 20, 5.0
# Largest difference from torch's output, as a share of the largest number in it: an export that is further off is wrong.
# The published decoder is at 1.6e-5, random weights; 1e-3 is a quarter of a grey level.
_WORST_ERROR = 1e-3


@dataclass(frozen=True)
class PartTiming:
    """Milliseconds for a batch of `IMAGES_PER_CALL` images, the best of several alternated rounds.

    torch_ms: the engine's fast path, not torch's modules as they are.
    """

    torch_ms: float
    onnx_ms: float


@dataclass(frozen=True)
class DeviceMeasurement:
    """Timings on one device; `provider` is ONNX Runtime's name of where it ran."""

    threads: int
    provider: str
    vqgan: PartTiming | None = None
    koclip: PartTiming | None = None

    def __str__(self) -> str:
        timings = {"VQGAN decoder": self.vqgan, "KoCLIP images": self.koclip}
        return "; ".join(
            f"{name}: torch {timing.torch_ms:.1f} ms, ONNX Runtime {timing.onnx_ms:.1f} ms for {IMAGES_PER_CALL} images"
            for name, timing in timings.items()
            if timing is not None
        )


@dataclass(frozen=True)
class ExportedFile:
    """One written file.

    source: digest of the config and weights that it was exported from.
    max_abs_error: largest difference from torch, the worst of the devices measured.
    """

    bytes: int
    source: str
    max_abs_error: float


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote and measured; the content of onnx.json."""

    facts: dict[str, Any]
    images: int
    files: dict[NetworkName, ExportedFile]
    measured: dict[str, DeviceMeasurement]


def export_model(folder: Path, out: Path, *, progress: bool = False) -> ExportReport:
    """Writes the folder's VQGAN and KoCLIP as ONNX, compares them with torch, and times both.

    All files are written aside and renamed together once they are compared; onnx.json comes last.

    Args:
        folder: a model folder.
        out: where the files go; the model folder itself for `codec_backend="onnx"`.

    Raises:
        InputError: no such folder, neither part in it, `out` is a file, onnx or onnxruntime is missing.
        RuntimeError: an exported network is further from torch than `_WORST_ERROR`; nothing is written then.
    """
    held: list[PartName] = [part for part in ("vqgan", "koclip") if has_part(folder, part)]
    if not held:
        raise InputError("model folder", folder, "has neither a vqgan nor a koclip: give a folder that has one")
    if out.exists() and not out.is_dir():
        raise InputError("--out", out, "is a file: give a folder")
    require("onnx", purpose="exporting", remedy="install it with `pip install onnx`")
    require("onnxruntime", purpose="comparing", remedy="install it with `pip install onnxruntime-gpu`")
    names = [name for name, network in NETWORKS.items() if network.part in held]
    modules = {part: load_part(folder, part) for part in held}
    sources = {part: weights_digest(folder, part) for part in held}
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for leftover in out.glob(".partial-*.onnx-*"):  # of an export that was killed: gigabytes, at the published size
        leftover.unlink(missing_ok=True)
    bar = ProgressBar("export", total=len(names) + len(devices), enabled=progress)
    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(atomic_file(onnx_file(out, name))) for name in names}
        stack.enter_context(bar)
        for done, name in enumerate(names):
            bar.update(done, f"writing {name}")
            part = NETWORKS[name].part
            export_network(modules[part], name, paths[name], source=sources[part])
        errors = dict.fromkeys(names, 0.0)
        measured: dict[str, DeviceMeasurement] = {}
        for done, device in enumerate(devices, start=len(names)):
            bar.update(done, f"measuring on {device.type}")
            measured[device.type], found = _measure(modules, paths, sources, device)
            errors = {name: max(errors[name], found[name]) for name in names}
        files = {
            name: ExportedFile(paths[name].stat().st_size, sources[NETWORKS[name].part], errors[name]) for name in names
        }
        (out / MEASUREMENT_FILE).unlink(missing_ok=True)
        bar.update(bar.total)
    report = ExportReport(facts(devices[-1]), IMAGES_PER_CALL, files, measured)
    write_json(out / MEASUREMENT_FILE, asdict(report))
    return report


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)  # as ONNX Runtime
def _measure(
    modules: dict[PartName, Any], paths: dict[NetworkName, Path], sources: dict[PartName, str], device: torch.device
) -> tuple[DeviceMeasurement, dict[NetworkName, float]]:
    """Timings on one device, and each network's largest error."""
    networks = {
        name: OnnxNetwork(path, name, source=sources[NETWORKS[name].part], device=device)
        for name, path in paths.items()
    }
    timings: dict[PartName, PartTiming] = {}
    errors: dict[NetworkName, float] = {}
    generator = torch.Generator("cpu").manual_seed(0)
    if "vqgan" in modules:
        vqgan: ImageCodec = modules["vqgan"].to(device)
        onnx_vqgan = OnnxVqgan(networks["vqgan_decoder"], vqgan.config)
        shape = (IMAGES_PER_CALL, vqgan.config.image_seq_len)
        image_tokens = _random_tokens(0, vqgan.config.codebook_size, shape, generator).to(device)
        errors["vqgan_decoder"] = _error(vqgan.decode, onnx_vqgan.decode, image_tokens, name="vqgan_decoder")
        decoder = FastDecoder(vqgan)
        timings["vqgan"] = _timing(
            lambda: decoder.decode(image_tokens), lambda: onnx_vqgan.decode(image_tokens), device
        )
    if "koclip" in modules:
        koclip: KoClip = modules["koclip"].to(device)
        onnx_koclip = OnnxKoClip(networks["koclip_image"], networks["koclip_text"], koclip.config)
        size, T = koclip.config.image_size, koclip.config.text_seq_len
        images_shape = (IMAGES_PER_CALL, 3, size, size)
        images = torch.rand(images_shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        texts = _random_tokens(PAD_TOKEN + 1, koclip.config.text_vocab_size, (IMAGES_PER_CALL, T), generator)
        texts[1:, T // 2 :] = PAD_TOKEN  # one caption without padding, the others with
        texts = texts.to(device)
        errors["koclip_image"] = _error(koclip.embed_images, onnx_koclip.embed_images, images, name="koclip_image")
        errors["koclip_text"] = _error(koclip.embed_texts, onnx_koclip.embed_texts, texts, name="koclip_text")
        encoder = KoclipEncoder(koclip)
        # Images only: the torch encoder caches the embeddings of captions, so a repeated one would cost it nothing.
        timings["koclip"] = _timing(
            lambda: encoder.embed_images(images), lambda: onnx_koclip.embed_images(images), device
        )
    provider = next(iter(networks.values())).provider
    return DeviceMeasurement(threads=torch.get_num_threads(), provider=provider, **timings), errors


def _random_tokens(low: int, high: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64, device="cpu")


def _error(
    torch_module: Callable[[Tensor], Tensor], onnx: Callable[[Tensor], Tensor], batch: Tensor, *, name: NetworkName
) -> float:
    """Largest absolute difference; raises RuntimeError when it is larger than rounding explains."""
    expected = torch_module(batch)
    error = float((onnx(batch) - expected).abs().max())
    allowed = _WORST_ERROR * float(expected.abs().max())
    if not error <= allowed:  # NaN too
        raise RuntimeError(f"{name} exported to ONNX is {error:.1e} from torch's output, {allowed:.1e} is allowed")
    return error


def _timing(ours: Callable[[], Any], onnx: Callable[[], Any], device: torch.device) -> PartTiming:
    """Best of several alternated rounds: load from other processes can only slow a round down. Warmed up by `_error`."""
    best = [float("inf"), float("inf")]
    started = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        for which, work in enumerate((ours, onnx)):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            best[which] = min(best[which], 1000 * (time.perf_counter() - start))
        if number + 1 >= _LEAST_ROUNDS and time.perf_counter() - started > _ENOUGH_S:
            break
    return PartTiming(torch_ms=best[0], onnx_ms=best[1])


def export_network(module: ImageCodec | KoClip, name: NetworkName, path: Path, *, source: str) -> None:
    """Writes one network to `path`. Not atomic: pass a temporary path.

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
        # A dozen warnings about constants that are constants indeed and about dynamo=False. An export that went wrong
        # would show in the comparison with torch.
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


class _VqganDecoder(nn.Module):
    """`Vqgan.decode` without its checks, which a graph cannot hold."""

    def __init__(self, vqgan: Vqgan) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, image_tokens: Tensor) -> Tensor:
        grid = self.vqgan.config.grid_size
        entries = F.embedding(image_tokens, self.vqgan.code_vectors())  # (B, N) -> (B, N, E)
        latents = entries.reshape(-1, grid, grid, entries.shape[-1]).permute(0, 3, 1, 2)  # (B, E, h, w)
        return to_unit_range(self.vqgan.decode_latents(latents))


class _TableDecoder(nn.Module):
    """`decode` of the other codec families, from their table of latent vectors, without its checks."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self.codec = codec
        self.register_buffer("table", codec.latent_table())

    def forward(self, image_tokens: Tensor) -> Tensor:
        grid = self.codec.config.grid_size
        entries = F.embedding(image_tokens, self.get_buffer("table"))  # (B, N) -> (B, N, Z)
        latents = entries.reshape(-1, grid, grid, entries.shape[-1]).permute(0, 3, 1, 2)  # (B, Z, h, w)
        return self.codec.to_images(self.codec.decoder(latents))


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


def _wrapped(module: ImageCodec | KoClip, name: NetworkName) -> tuple[nn.Module, Tensor]:
    """The network as a module of one input and one output, and an example input on the CPU."""
    rows = _EXAMPLE_ROWS
    if not isinstance(module, KoClip):
        decoder = _VqganDecoder(module) if isinstance(module, Vqgan) else _TableDecoder(module)
        return decoder, torch.zeros((rows, module.config.image_seq_len), dtype=torch.int64, device="cpu")
    config = module.config
    if name == "koclip_image":
        images_shape = (rows, 3, config.image_size, config.image_size)
        return _KoClipImage(module), torch.full(images_shape, 0.5, dtype=torch.float32, device="cpu")
    text_tokens = torch.full((rows, config.text_seq_len), PAD_TOKEN + 1, dtype=torch.int64, device="cpu")
    return _KoClipText(module), text_tokens
