"""How fast each way of decoding images is on this CPU, and how fast images are embedded for ranking.

    python benchmarks/codec_speed.py                     models/clothing and the published size (random weights)
    python benchmarks/codec_speed.py --models models/clothing --images 16 --repeat 9

    modules        `Vqgan.decode` in float32, one batch: the baseline
    image threads  the same modules, one image a thread (engine.codec.threads)
    row tiles      Winograd convolutions by torch's operators on tiles of rows, one image a thread (engine.codec.vqgan_cpu)
    compiled       the same network with compiled convolutions; where the package was built with a C++ compiler
    bfloat16       the modules channels last, one image a thread; only on processors that multiply it
    onnx           the exported decoder in ONNX Runtime

The ways are timed in turns, one run each a round, so that other load on the machine meets all of them. On a busy machine
compare processor time with `--threads 1`: threads that wait for each other spend most of both times waiting. Prints a table
and, as the last line, one JSON document, also stored in <out>/results/codec_speed/<hardware>-<models>-threads-<n>.json.
"""

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, kept_when_stopped, print_document, store_document
from sampling.plan import published_sizes
from text_table import seconds_text, table
from torch import Tensor

from engine.codec.compiled_convolution import convolution_library
from engine.codec.koclip_encoder import KoclipEncoder
from engine.codec.onnx_backend import open_koclip, open_vqgan
from engine.codec.onnx_export import export_model
from engine.codec.vqgan_cpu import fits_compiled
from engine.codec.vqgan_decoder import WIDE_CHANNELS, FastDecoder
from engine.device import cpu_capabilities, fit_to_machine
from engine.facts import facts
from engine.measure import count_flops
from engine.models.folder import Part, load_part, write_model_folder
from engine.models.folder_config import has_part
from engine.models.koclip import KoClip
from engine.models.vqgan import Vqgan
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

_PUBLISHED = "published"
_CPU = torch.device("cpu")

Row = dict[str, Any]
Work = Callable[[Tensor], Tensor]


def main() -> int:
    arguments = _arguments()
    allowed = fit_to_machine()
    torch.set_num_threads(arguments.threads or allowed)
    document: dict[str, Any] = {
        "benchmark": "codec_speed",
        **facts(_CPU),
        "config": {"models": arguments.models, "images": arguments.images, "repeat": arguments.repeat},
        "rows": [],
    }
    with kept_when_stopped(document):
        for model in arguments.models:
            with tempfile.TemporaryDirectory(prefix="codec-speed-") as scratch:
                for row in _model_rows(model, Path(scratch), arguments):
                    document["rows"].append(row)
    models = "-".join(Path(model).name for model in arguments.models)
    store_document(document, arguments.out, quick=False, tag=f"-{models}-threads-{torch.get_num_threads()}")
    print(_table(document["rows"]), end="\n\n")
    print_document(document)
    return 1 if "stopped" in document else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [str(REPOSITORY / "models" / "clothing"), _PUBLISHED]
    parser.add_argument("--models", nargs="+", default=default, help=f"model folders, or {_PUBLISHED} (random weights)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="images in a batch")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, help="of torch and ONNX Runtime (default: as many as processors)")
    parser.add_argument("--out", type=Path, help="folder for results/ (default: benchmarks/)")
    return parser.parse_args()


def _model_rows(model: str, scratch: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    folder = scratch / "model" if model == _PUBLISHED else Path(model)
    if model == _PUBLISHED:
        _write_published(folder)
    vqgan: Vqgan = load_part(folder, "vqgan")
    koclip: KoClip = load_part(folder, "koclip")
    onnx = scratch / "onnx"
    print(f"{model}: exporting to ONNX", file=sys.stderr, flush=True)
    export_model(folder, onnx)
    for name in ("vqgan.safetensors", "koclip.safetensors", "config.json"):  # what the exported files belong to
        (onnx / name).symlink_to((folder / name).resolve())
    decoders: dict[str, Work] = {
        "modules": vqgan.decode,
        "image threads": FastDecoder(vqgan, way="modules").decode,
        "row tiles": FastDecoder(vqgan, way="row tiles").decode,
        "onnx": open_vqgan(onnx, vqgan.config, _CPU).decode,
    }
    if fits_compiled(vqgan.decoder) and convolution_library() is not None:
        decoders["compiled"] = FastDecoder(vqgan, way="compiled").decode
    if cpu_capabilities().multiplies_bfloat16:
        decoders["bfloat16"] = FastDecoder(vqgan, precision="bfloat16").decode
    embedders: dict[str, Work] = {
        "modules": koclip.embed_images,
        "image threads": KoclipEncoder(koclip).embed_images,
        "onnx": open_koclip(onnx, koclip.config, _CPU).embed_images,
    }
    generator = torch.Generator("cpu").manual_seed(0)
    for count in arguments.images:
        tokens = _tokens(folder, vqgan.config, count, generator)
        exact = _decoded_exactly(vqgan, tokens)
        wide = vqgan.config.base_channels >= WIDE_CHANNELS
        without_compiler = "row tiles" if wide else "image threads"
        yield from _compare(
            f"{Path(model).name}: decode",
            decoders,
            tokens,
            arguments.repeat,
            exact=exact,
            without_compiler=without_compiler,
        )
        size = koclip.config.image_size
        images = torch.rand(count, 3, size, size, generator=generator, dtype=torch.float32, device=_CPU)
        yield from _compare(f"{Path(model).name}: embed images", embedders, images, arguments.repeat)


def _tokens(folder: Path, config: Any, count: int, generator: torch.Generator) -> Tensor:
    """(count, N): of images that the model generates; random ones without a transformer."""
    if has_part(folder, "transformer"):
        pipeline = Pipeline.from_pretrained(folder)
        captions = pipeline.caption_guide.examples[:1]
        return pipeline.decode(pipeline.prepare(captions, SamplingParams(candidates=count)))[0]
    shape = (count, config.image_seq_len)
    return torch.randint(config.codebook_size, shape, generator=generator, dtype=torch.int64, device=_CPU)


@torch.inference_mode()
def _compare(
    what: str,
    works: dict[str, Work],
    batch: Tensor,
    repeat: int,
    *,
    exact: Tensor | None = None,
    without_compiler: str = "",
) -> list[Row]:
    """One row a way. `times_faster` than the modules, by time on the clock and by processor time of all threads.

    Args:
        exact: images in float64.
        without_compiler: the way of float32 where the package was built without one.
    """
    print(f"{what}, {len(batch)} images", file=sys.stderr, flush=True)
    baseline = next(iter(works))
    expected, flops = count_flops(lambda: works[baseline](batch))
    found = {name: work(batch) for name, work in works.items()}  # also the warm-up
    differences = {name: values - expected for name, values in found.items()}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            work(batch)
            runs[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    rows: list[Row] = []
    for name in works:
        seconds, cpu_seconds = zip(*runs[name], strict=True)
        rows.append({
            "what": what,
            "images": len(batch),
            "way": name,
            "seconds": statistics.median(seconds),
            "seconds_range": [min(seconds), max(seconds)],
            "cpu_seconds": statistics.median(cpu_seconds),
            "cpu_seconds_range": [min(cpu_seconds), max(cpu_seconds)],
            "gflop": flops / 1e9,  # of the modules; Winograd needs a quarter of a convolution's products
            "max_abs_error": float(differences[name].abs().max()),
            "psnr_db": _psnr(differences[name]),
        } | ({} if exact is None else _pixels(found[name], found[without_compiler], exact)))  # fmt: skip
    for row in rows:
        for unit in ("seconds", "cpu_seconds"):
            row[f"times_faster_by_{unit}"] = rows[0][unit] / row[unit]
    return rows


def _decoded_exactly(vqgan: Vqgan, tokens: Tensor) -> Tensor:
    """Images by the modules in float64, one after the other."""
    double = copy.deepcopy(vqgan).double()
    return torch.cat([double.decode(one) for one in tokens.split(1)])


def _pixels(found: Tensor, others: Tensor, exact: Tensor) -> Row:
    """What differs from images in float64, and after rounding to 255 levels, as in a PNG, from those of the way without a compiler."""
    levels = [(255 * images).round() for images in (found, others)]
    return {
        "rms_error_to_float64": float((found - exact).square().mean().sqrt()),
        "psnr_db_to_the_way_without_compiler": _psnr(found - others),
        "largest_level_difference": int((levels[0] - levels[1]).abs().max()),
        "equal_levels": float((levels[0] == levels[1]).double().mean()),
        "equal_images": sum(torch.equal(one, other) for one, other in zip(*levels, strict=True)),
    }


def _psnr(difference: Tensor) -> float | None:
    """Of values in [0, 1]; None: no difference at all."""
    squared = float(difference.double().square().mean())
    return None if squared == 0 else round(-10 * math.log10(squared), 1)


def _write_published(folder: Path) -> None:
    """The codec and the ranker of configs/kodalle with random weights."""
    _, vqgan_config, koclip_config = published_sizes()
    torch.manual_seed(0)
    vqgan, koclip = Vqgan(vqgan_config), KoClip(koclip_config)
    parts: dict[Any, Part] = {
        "vqgan": Part(vqgan.config, vqgan.state_dict()),
        "koclip": Part(koclip.config, koclip.state_dict()),
    }
    write_model_folder(folder, parts, card="Random weights, for timing.\n")


def _table(rows: list[Row]) -> str:
    cells = [
        [
            f"{row['what']}, {row['images']}",
            row["way"],
            seconds_text(row["seconds"]),
            f"{row['times_faster_by_seconds']:.2f}x",
            seconds_text(row["cpu_seconds"]),
            "-".join(seconds_text(each) for each in row["cpu_seconds_range"]),
            f"{row['times_faster_by_cpu_seconds']:.2f}x",
            f"{row['gflop'] / row['cpu_seconds']:.0f}",
            f"{row['max_abs_error']:.1e}",
            "-" if row["psnr_db"] is None else f"{row['psnr_db']:.0f}",
        ]
        for row in rows
    ]
    header = [
        "what",
        "way",
        "clock",
        "modules/it",
        "processor",
        "range",
        "modules/it",
        "GFLOP/s",
        "max abs error",
        "dB",
    ]
    return table("Images on a CPU, float32: median times of a batch", header, cells)


if __name__ == "__main__":
    sys.exit(main())
