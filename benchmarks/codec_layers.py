"""Where the time of decoding an image goes on a CPU, layer by layer, beside the machine's limit: python benchmarks/codec_layers.py

Decodes at the published size (random weights) on one thread, as each thread of a batch does, with the ways of engine.codec.vqgan_cpu
(compiled convolutions, and torch's operators), and times every step. Times are of the processor, best of `--repeat`.

The floor of a step is its products over the speed of the processor's best convolution or matrix product, measured in the same run:
those that Winograd needs (a quarter of a direct convolution's; 25 of 144 after a doubling). Passes over memory are not in it: rows
stay in the cache.
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 with `--tag=-avx2` limits all to AVX2.
The last line is one JSON document, also stored in <out>/results/codec_layers/<hardware>.json.
"""

import argparse
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine_facts import print_document, store_document
from sampling.plan import published_sizes
from text_table import table
from torch import Tensor

from engine.codec.compiled_convolution import convolution_library
from engine.codec.vqgan_cpu import CpuDecoder, _Attention, _Block
from engine.codec.vqgan_row_tiles import Activation, ThreadPool, convolve
from engine.device import cpu_capabilities
from engine.facts import facts
from engine.models.vqgan import Vqgan
from kernels.convolution import CompiledConv

_CPU = torch.device("cpu")


class Layer(NamedTuple):
    """Seconds, operations of a direct convolution, and the share of them that is left."""

    seconds: float
    operations: float
    left: float


_WINOGRAD, _DOUBLED = 36 / 144, 25 / 144  # products of a direct convolution's that are left


_COMPILED, _TORCH = "float32, compiled", "float32, torch's operators"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tag", default="", help="of the stored file's name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vqgan = Vqgan(published_sizes()[1]).eval()
    document: dict[str, Any] = {"benchmark": "codec_layers", **facts(_CPU)}
    document["gflops"] = peaks = _peaks(arguments.repeat)
    document["rows"] = []
    with torch.no_grad():
        for way in _ways():
            decoder = CpuDecoder(vqgan.decoder, library=None if way == _TORCH else convolution_library())
            rows = _layers(decoder, vqgan.latent_table()[:256].view(16, 16, -1), arguments.repeat)
            for name, (seconds, direct, left) in rows.items():
                floor_s = direct * left / peaks["float32"] / 1e9
                document["rows"].append({
                    "way": way, "layer": name, "ms": round(1e3 * seconds, 1), "gflop": round(direct / 1e9, 1),
                    "floor_ms": round(1e3 * floor_s, 1), "share_of_floor": round(floor_s / seconds, 2),
                })  # fmt: skip
    _print(document)
    store_document(document, arguments.out, quick=False, tag=arguments.tag)
    print_document(document)
    return 0


def _ways() -> list[str]:
    compiled = [_COMPILED] if convolution_library() is not None else []
    return [*compiled, _TORCH]


def _peaks(repeat: int) -> dict[str, float]:
    """GFLOP/s of one core: the best of some convolutions and matrix products."""
    best: dict[str, float] = defaultdict(float)
    cpu = cpu_capabilities()
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if cpu.multiplies_bfloat16 else {})
    with torch.inference_mode():
        for channels, side in ((128, 64), (256, 64), (512, 32)):
            flops = 18 * channels * channels * side * side
            works: list[tuple[str, float, Callable[[], Any]]] = []
            for name, dtype in dtypes.items():
                pixels, weight, square = (
                    torch.randn(shape, device=_CPU, dtype=torch.float32).to(dtype)
                    for shape in ((1, channels, side, side), (channels, channels, 3, 3), (1024, 1024))
                )
                images, kernel = (value.to(memory_format=torch.channels_last) for value in (pixels, weight))
                works.append((name, flops, functools.partial(F.conv2d, images, kernel, padding=1)))
                works.append((name, 2 * 1024**3, functools.partial(torch.mm, square, square)))
            for name, operations, work in works:
                best[name] = max(best[name], operations / _best(work, repeat) / 1e9)
    return {name: round(value) for name, value in best.items()}


def _layers(decoder: CpuDecoder, latents: Tensor, repeat: int) -> dict[str, Layer]:
    """By layer, all that are alike together."""
    best: dict[str, Layer] = {}
    for _ in range(repeat + 1):
        for name, found in _one_image(decoder, latents).items():
            best[name] = min(best.get(name, found), found)
    return best


def _one_image(decoder: CpuDecoder, latents: Tensor) -> dict[str, Layer]:
    threads, found = ThreadPool(threading.local()), defaultdict[str, Layer](lambda: Layer(0.0, 0.0, 1.0))

    def timed(name: str, direct: float, left: float, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = Layer(found[name].seconds + time.process_time() - start, found[name].operations + direct, left)
        return result

    stream = threads.buffer("stream 0", *latents.shape[:2], decoder._first.channels_out)
    moments = timed(
        "first convolution", 18 * latents.numel() * stream.shape[2], _WINOGRAD,
        lambda: convolve(decoder._first, latents, stream, threads),
    )  # fmt: skip
    for number, step in enumerate(decoder._steps, start=1):
        H, W, C = stream.shape
        here = f"{C} channels, {H} x {W}"
        if isinstance(step, _Attention):
            direct = 2 * H * W * (4 * C * C + 2 * H * W * C)
            run = functools.partial(step, stream, moments, threads, name=f"stream {number}")
            stream, moments = timed(f"attention, {here}", direct, 1, run)
        elif isinstance(step, _Block):
            K = step._conv1.channels_out
            direct = H * W * (18 * (C * K + K * K) + (2 * C * K if step._shortcut is not None else 0))
            run = functools.partial(step, stream, moments, threads, name=f"stream {number}")
            stream, moments = timed(f"residual blocks, {K} channels, {H} x {W}", direct, _WINOGRAD, run)
        else:
            larger = threads.buffer(f"stream {number}", 2 * H, 2 * W, step.channels_out)
            double = functools.partial(convolve, step, stream, larger, threads)
            moments = timed(f"doubling to {2 * H} x {2 * W}", 18 * larger.numel() * C, _DOUBLED, double)
            stream = larger
    image = threads.buffer("image", *stream.shape[:2], decoder._last.channels_out)
    activation = Activation.after(decoder._last_norm, moments)
    direct = 18 * stream.numel() * image.shape[2]
    left = _WINOGRAD if isinstance(decoder._last, CompiledConv) else 1
    timed(
        "last convolution", direct, left,
        lambda: convolve(decoder._last, stream, image, threads, activation=activation, measured=False),
    )  # fmt: skip
    return dict(found)


def _best(work: Callable[[], Any], repeat: int) -> float:
    work()
    seconds = []
    for _ in range(2 * repeat):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _print(document: dict[str, Any]) -> None:
    print("GFLOP/s of one core:", ", ".join(f"{name} {value}" for name, value in document["gflops"].items()))
    for way in dict.fromkeys(row["way"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["way"] == way]
        total = sum(row["ms"] for row in rows)
        lines = [
            [
                row["layer"],
                f"{row['ms']:.0f}",
                f"{row['ms'] / total:.0%}",
                f"{row['gflop']:.1f}",
                f"{row['floor_ms']:.0f}",
                f"{row['share_of_floor']:.0%}",
            ]
            for row in rows
        ]
        floor = sum(row["floor_ms"] for row in rows)
        lines.append(
            [
                "all",
                f"{total:.0f}",
                "100%",
                f"{sum(row['gflop'] for row in rows):.1f}",
                f"{floor:.0f}",
                f"{floor / total:.0%}",
            ]
        )
        print(table(way, ["layer", "ms", "share", "GFLOP", "floor ms", "floor/it"], lines))


if __name__ == "__main__":
    raise SystemExit(main())
