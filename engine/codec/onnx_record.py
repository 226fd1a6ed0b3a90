"""Exporting a model folder to ONNX, measured against torch; and following what was measured, when drawing.

torch here is the engine's own fast path (engine.codec.vqgan_decoder, engine.codec.koclip_encoder). Which of the
two decodes changes pixels (by some 1e-5, so a grey level here and there), and the same seed must give the same picture in every process. So no stopwatch decides at drawing time: `kodalle export` measures both once, on the
machine it runs on, and writes down what it found and chose (`onnx.json`). Whoever draws from the folder follows that
record, here, tomorrow, on each replica. A folder without the record is decoded by torch, as it always was.

    {"format": 2, "pictures": 4, "torch": "2.13.0", "onnxruntime": "1.31.0",
     "files": {"vqgan_decoder": {"bytes": 186881645, "source": "<digest>", "max_abs_error": 1.6e-05}, …},
     "measured": {"cpu": {"threads": 2, "provider": "CPUExecutionProvider",
                          "vqgan": {"torch_ms": 4100.0, "onnx_ms": 6385.0, "backend": "torch"}, "koclip": {…}}}}

ONNX is chosen when it takes less than 90 % of torch's time: closer than that, noise would choose, and torch needs no
second copy of the weights. To choose otherwise, edit `backend`, or remove the file.

B pictures, N image tokens, S pixels, M captions, T text tokens.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_runtime import (
    PICTURES_AT_ONCE,
    OnnxKoClip,
    OnnxNetwork,
    OnnxVqgan,
    open_koclip,
    open_vqgan,
)
from engine.codec.vqgan_decoder import FastVqganDecoder, Precision, decodes_int8
from engine.config import Section
from engine.config_files import parse_section
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.files import atomic_file, read_json, write_json
from engine.measure import synchronize
from engine.models.folder import PartName, has_part, load_part, weights_digest
from engine.models.koclip import PAD_TOKEN, KoClip
from engine.models.onnx_export import NETWORKS, NetworkName, export_network, onnx_file, require
from engine.models.vqgan import Vqgan
from engine.progress import ProgressBar

RECORD_FILE = "onnx.json"
CodecBackend = Literal["auto", "torch", "onnx"]
_PICTURES = PICTURES_AT_ONCE
_MUST_BEAT = 0.9  # of torch's time
_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_S = 3, 20, 5.0
# Largest difference from torch's answer, as a share of the largest number in that: an export that is further off is
# wrong. The published decoder is at 1.6e-5, random weights; 1e-3 is a quarter of a grey level.
_WORST_ERROR = 1e-3


class Codec(NamedTuple):
    """Who decodes and who embeds, each picture and caption as if it were alone; `KoClip` itself still scores."""

    decoder: FastVqganDecoder | OnnxVqgan
    embedder: KoclipEncoder | OnnxKoClip | None

    @classmethod
    def of(cls, vqgan: Vqgan, koclip: KoClip | None, *, int8: bool = False) -> "Codec":
        """torch's, of the models' type; weights are repacked, so train the models on and make a new one.

        Args:
            int8: 8-bit convolutions in the VQGAN; on a CPU without VNNI the models' type, which one line on stderr says.

        Raises:
            InputError: int8 on a GPU.
        """
        return cls(_torch_decoder(vqgan, int8=int8), None if koclip is None else KoclipEncoder(koclip))


class PartTiming(Section):
    """Milliseconds for 4 pictures, the best of several rounds."""

    torch_ms: float = Field(gt=0)
    onnx_ms: float = Field(gt=0)
    backend: Literal["torch", "onnx"] = Field(description="what `auto` uses")


class DeviceRecord(Section):
    threads: int
    provider: str = Field(description="ONNX Runtime's name of where it ran")
    vqgan: PartTiming | None = None
    koclip: PartTiming | None = None

    def __str__(self) -> str:
        told = {"VQGAN decoder": self.vqgan, "KoCLIP": self.koclip}
        return "; ".join(
            f"{name} by {'ONNX Runtime' if one.backend == 'onnx' else 'torch'} "
            f"(torch {one.torch_ms:.1f} ms, ONNX Runtime {one.onnx_ms:.1f} ms for {_PICTURES} pictures)"
            for name, one in told.items()
            if one is not None
        )


class FileRecord(Section):
    bytes: int
    source: str = Field(description="digest of the config and weights that it was made from")
    max_abs_error: float = Field(description="largest difference from torch, the worst of the devices measured")


class OnnxRecord(Section):
    """onnx.json."""

    format: Literal[2] = 2  # 1 timed torch's modules as they are, several times slower than what draws now
    pictures: int = _PICTURES
    torch: str
    onnxruntime: str
    files: dict[NetworkName, FileRecord]
    measured: dict[Literal["cpu", "cuda"], DeviceRecord]


# ------------------------------------------------------------------------------------------------------------ drawing


def choose_codec(
    folder: Path,
    vqgan: Vqgan,
    koclip: KoClip | None,
    *,
    backend: CodecBackend,
    device: torch.device,
    dtype: torch.dtype,
    int8: bool = False,
) -> Codec:
    """Who decodes and embeds for a folder; with `auto` and a record, one line on stderr says what and why.

    Args:
        backend: `torch`; `onnx` (float32 whatever `dtype`); or `auto`, what `onnx.json` recorded for this kind of
            device, and torch where it says nothing: no record, another kind of device, another type than float32.
        int8: 8-bit convolutions in the VQGAN, by torch, whatever the record says; see `Codec.of`.

    Raises:
        InputError: unknown backend; a record that is broken; int8 by ONNX or on a GPU; or, where ONNX is to
            be used, what `OnnxNetwork` refuses.
    """
    if backend not in ("auto", "torch", "onnx"):
        raise InputError("codec_backend", backend, "write auto, torch or onnx")
    if int8 and backend == "onnx":
        raise InputError("codec_backend", backend, "has no int8: write auto or torch, or leave int8 out")
    parts: set[PartName] = {"vqgan", "koclip"} if backend == "onnx" else set()
    if backend == "auto" and (folder / RECORD_FILE).is_file():
        parts = _recorded_parts(folder, device, dtype)
    by_onnx = "vqgan" in parts and not int8
    decoder = open_vqgan(folder, vqgan.config, device) if by_onnx else _torch_decoder(vqgan, int8=int8)
    if koclip is None:
        return Codec(decoder, None)
    return Codec(decoder, open_koclip(folder, koclip.config, device) if "koclip" in parts else KoclipEncoder(koclip))


def _torch_decoder(vqgan: Vqgan, *, int8: bool = False) -> FastVqganDecoder:
    """In the VQGAN's dtype, or with 8-bit convolutions where the processor gains by them."""
    weight = vqgan.post_quant_conv.weight
    dtypes: dict[torch.dtype, Precision] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    precision = dtypes.get(weight.dtype, "float32")
    if int8 and weight.device.type == "cpu" and not decodes_int8(weight.device):
        _report_no_int8(precision)
        return FastVqganDecoder(vqgan, precision=precision)
    return FastVqganDecoder(vqgan, precision="int8" if int8 else precision)


@functools.cache
def _report_no_int8(precision: Precision) -> None:
    isa = cpu_capabilities().isa
    print(f"codec: {precision} instead of int8, which is slower on a processor without VNNI ({isa})", file=sys.stderr)


def read_record(folder: Path) -> OnnxRecord:
    """Raises InputError: missing, not JSON, or not in this format, by field."""
    path = folder / RECORD_FILE
    tree = read_json(path, field="ONNX record", remedy="run `kodalle export` on the model folder again, or remove it")
    record: OnnxRecord = parse_section(OnnxRecord, tree, source=str(path))
    return record


def _recorded_parts(folder: Path, device: torch.device, dtype: torch.dtype) -> set[PartName]:
    """The parts that the record gives to ONNX Runtime."""
    measured = read_record(folder).measured
    if dtype != torch.float32:
        print(f"codec: torch; {RECORD_FILE} speaks of float32, this is {dtype}", file=sys.stderr)
        return set()
    found = {"cpu": measured.get("cpu"), "cuda": measured.get("cuda")}.get(device.type)
    if found is None:
        print(f"codec: torch; {RECORD_FILE} says nothing of {device.type}, export there to compare", file=sys.stderr)
        return set()
    print(f"codec: {found}, as `kodalle export` measured", file=sys.stderr)
    timings: dict[PartName, PartTiming | None] = {"vqgan": found.vqgan, "koclip": found.koclip}
    return {part for part, timing in timings.items() if timing is not None and timing.backend == "onnx"}


# ---------------------------------------------------------------------------------------------------------- exporting


def export_model(folder: Path, out: Path, *, progress: bool = False) -> OnnxRecord:
    """Writes what the folder has of VQGAN and KoCLIP as ONNX, compares with torch, measures both, records it.

    All files are written aside and renamed together once they are compared; the record comes last.

    Args:
        folder: a model folder.
        out: where the files go; the same folder for the pipeline to find them.

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
    runtime = require("onnxruntime", purpose="comparing", remedy="install it with `pip install onnxruntime-gpu`")
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
        measured: dict[Any, DeviceRecord] = {}
        for done, device in enumerate(devices, start=len(names)):
            bar.update(done, f"measuring on {device.type}")
            measured[device.type], found = _measure(modules, paths, sources, device)
            errors = {name: max(errors[name], found[name]) for name in names}
        record = OnnxRecord(
            torch=torch.__version__,
            onnxruntime=runtime.__version__,
            files={
                name: FileRecord(
                    bytes=paths[name].stat().st_size,
                    source=sources[NETWORKS[name].part],
                    max_abs_error=errors[name],
                )
                for name in names
            },
            measured=measured,
        )
        (out / RECORD_FILE).unlink(missing_ok=True)
        bar.update(bar.total)
    write_json(out / RECORD_FILE, record.model_dump(mode="json"))
    return record


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)  # as ONNX Runtime
def _measure(
    modules: dict[PartName, Any], paths: dict[NetworkName, Path], sources: dict[PartName, str], device: torch.device
) -> tuple[DeviceRecord, dict[NetworkName, float]]:
    """Times and errors on one device; the errors by network."""
    networks = {
        name: OnnxNetwork(path, name, source=sources[NETWORKS[name].part], device=device)
        for name, path in paths.items()
    }
    timings: dict[PartName, PartTiming] = {}
    errors: dict[NetworkName, float] = {}
    generator = torch.Generator().manual_seed(0)
    if "vqgan" in modules:
        vqgan: Vqgan = modules["vqgan"].to(device)
        onnx_vqgan = OnnxVqgan(networks["vqgan_decoder"], vqgan.config)
        shape = (_PICTURES, vqgan.config.image_seq_len)
        image_tokens = torch.randint(vqgan.config.codebook_size, shape, generator=generator).to(device)
        errors["vqgan_decoder"] = _error(vqgan.decode, onnx_vqgan.decode, image_tokens, name="vqgan_decoder")
        decoder = FastVqganDecoder(vqgan)
        timings["vqgan"] = _timing(
            lambda: decoder.decode(image_tokens), lambda: onnx_vqgan.decode(image_tokens), device
        )
    if "koclip" in modules:
        koclip: KoClip = modules["koclip"].to(device)
        onnx_koclip = OnnxKoClip(networks["koclip_image"], networks["koclip_text"], koclip.config)
        size, T = koclip.config.image_size, koclip.config.text_seq_len
        images = torch.rand(_PICTURES, 3, size, size, generator=generator).to(device)
        texts = torch.randint(PAD_TOKEN + 1, koclip.config.text_vocab_size, (_PICTURES, T), generator=generator)
        texts[1:, T // 2 :] = PAD_TOKEN  # captions fill their row or part of it
        texts = texts.to(device)
        errors["koclip_image"] = _error(koclip.embed_images, onnx_koclip.embed_images, images, name="koclip_image")
        errors["koclip_text"] = _error(koclip.embed_texts, onnx_koclip.embed_texts, texts, name="koclip_text")
        encoder = KoclipEncoder(koclip)
        # Pictures alone: a caption is encoded once and then remembered, so it would cost torch nothing here.
        timings["koclip"] = _timing(
            lambda: encoder.embed_images(images), lambda: onnx_koclip.embed_images(images), device
        )
    provider = next(iter(networks.values())).provider
    return DeviceRecord(threads=torch.get_num_threads(), provider=provider, **timings), errors


def _error(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], rows: Tensor, *, name: NetworkName
) -> float:
    """Largest absolute difference; raises RuntimeError when it is no rounding any more."""
    expected = ours(rows)
    error = float((theirs(rows) - expected).abs().max())
    allowed = _WORST_ERROR * float(expected.abs().max())
    if not error <= allowed:  # NaN too
        raise RuntimeError(f"{name} exported to ONNX is {error:.1e} from torch's answer, {allowed:.1e} is allowed")
    return error


def _timing(ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device) -> PartTiming:
    """Both in turn, the best of several rounds: a neighbour's load can only slow a round down. Warm by `_error`."""
    best = [float("inf"), float("inf")]
    begun = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        for which, work in enumerate((ours, theirs)):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            best[which] = min(best[which], 1000 * (time.perf_counter() - start))
        if number + 1 >= _LEAST_ROUNDS and time.perf_counter() - begun > _ENOUGH_S:
            break
    torch_ms, onnx_ms = best
    backend: Literal["torch", "onnx"] = "onnx" if onnx_ms < _MUST_BEAT * torch_ms else "torch"
    return PartTiming(torch_ms=torch_ms, onnx_ms=onnx_ms, backend=backend)
