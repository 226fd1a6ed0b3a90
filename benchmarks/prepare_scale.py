"""Preparing a delivery of many pairs: pairs a second, memory, and whether a killed run ends with the same bytes.

    python benchmarks/prepare_scale.py                                10,000 and 100,000 pairs, then the other parts
    python benchmarks/prepare_scale.py --parts prepare-10000,photo    some of the parts; the rest of the document stays
    python benchmarks/prepare_scale.py --quick                        200 pairs, a tiny VQGAN: does it run?

Parts, each in a process of its own (its peak of resident memory is the part's), with one worker:

    prepare-N   a generated delivery (two sides, labels and photographs in parallel folders of 23 styles, names that repeat)
                of N photographs of 48 x 72 pixels, real JPEGs of distinct bytes, to 32 pixels
    read-N      the prepared folder read as trainings do (`load_pairs`), and its images hashed (`image_digests`)
    killed      1/20 of the largest N: killed at half, started again, compared file by file with a run that was not
    photo       photographs of 800 x 1,066 pixels to 256 pixels, the published size: what a real pair costs
    encode      photographs to token shards with the published VQGAN (random weights) on this CPU

A slow machine does `prepare-N` in pieces: with `--limit-s 400 --scratch FOLDER` it is interrupted, and the same command goes on.
Seconds and processor seconds are of all pieces. The processor's seconds tell more where others use the machine too.

What limits the numbers: photographs are decoded, resized and compressed again (`photo`); with tiny ones the reading of labels,
the writing of two files a pair and the journals are left (`prepare-N`). The last line is one JSON document, also stored as
<out>/results/prepare_scale/<hardware>.json.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine_facts import REPOSITORY, child_environment, hardware_name, print_document, slug, store_document
from PIL import Image
from text_table import table

SIZES = (10_000, 100_000)
_STYLES = 23
_HELD_OUT = 20  # one photograph in so many
_COLOURS = ("블랙", "화이트", "네이비", "레드", "그레이", "베이지")
_KINDS = ("티셔츠", "셔츠", "블라우스", "니트웨어")
Part = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    if arguments.part is not None:
        print(json.dumps(_measure(arguments.part, arguments.folder, quick=arguments.quick)))
        return 0
    import torch  # not in the processes of the parts, whose memory is measured

    from engine.facts import facts

    document: dict[str, Any] = {
        "benchmark": "prepare_scale", **facts(torch.device("cpu")), "quick": arguments.quick, "parts": {},
    }  # fmt: skip
    stored = _stored(document, arguments.out, quick=arguments.quick)
    document["parts"] = json.loads(stored.read_text(encoding="utf-8"))["parts"] if stored.is_file() else {}
    with contextlib.ExitStack() as stack:
        scratch = arguments.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prepare-scale-")))
        scratch.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts:
            print(f"{part} …", file=sys.stderr, flush=True)
            found = _child(part, scratch, quick=arguments.quick, limit_s=arguments.limit_s)
            document["parts"][part] = {**found, "commit": document["commit"]}
            store_document(document, arguments.out, quick=arguments.quick)
            if found.get("unfinished"):
                print(f"{part} reached --limit-s: run it again with the same --scratch", file=sys.stderr)
                break
    print(_table(document["parts"]), end="\n\n")
    print_document(document)
    return 0


def write_delivery(root: Path, count: int, *, size: tuple[int, int] = (48, 72)) -> None:
    """`count` labels with a photograph each, of `size` (width, height) in pixels; no two photographs have the same bytes."""
    rng = np.random.default_rng(0)
    pictures = [_jpeg(root.parent, rng, size) for _ in range(32)]
    width, height = size
    box = {"X좌표": width * 0.1, "Y좌표": height * 0.1, "가로": width * 0.8, "세로": height * 0.8}
    for number in range(count):
        side = "Validation" if number % _HELD_OUT == 0 else "Training"
        style = f"스타일{number % _STYLES:02d}"
        name = f"({number // _STYLES % 500})IMG_{number // _STYLES}"
        label, photo = (root / side / kind / style for kind in ("라벨링데이터", "원천데이터"))
        if number < _STYLES * _HELD_OUT:
            label.mkdir(parents=True, exist_ok=True)
            photo.mkdir(parents=True, exist_ok=True)
        top = {"색상": _COLOURS[number % len(_COLOURS)], "카테고리": _KINDS[number % len(_KINDS)], "소매기장": "긴팔"}
        tree = {
            "이미지 정보": {"이미지 식별자": number, "이미지 높이": height, "이미지 파일명": f"{name}.jpg", "이미지 너비": width},
            "데이터셋 정보": {"데이터셋 상세설명": {"렉트좌표": {"상의": [box]}, "라벨링": {"스타일": [{}], "상의": [top]}}},
        }  # fmt: skip
        (label / f"{name}.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        start, rest = pictures[number % len(pictures)]
        comment = f"{number:010d}".encode()
        (photo / f"{name}.jpg").write_bytes(
            start + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + rest
        )


def _jpeg(folder: Path, rng: np.random.Generator, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """A JPEG of a coarse random picture, in two parts: before and after the place of a comment."""
    file = folder / "picture.jpg"
    coarse = Image.fromarray(rng.integers(0, 256, (9, 6, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
    content = file.read_bytes()
    return content[:2], content[2:]  # behind the start-of-image marker


# -------------------------------------------------------------------------------------------------------------- parts


def _measure(part: str, folder: Path, *, quick: bool) -> Part:
    name, _, number = part.partition("-")
    measures: dict[str, Callable[[], Part]] = {
        "prepare": lambda: _prepare(folder, int(number)),
        "read": lambda: _read(folder, int(number)),
        "killed": lambda: _killed(folder, 200 if quick else max(SIZES) // 20),
        "photo": lambda: _photo(folder, 8 if quick else 200),
        "encode": lambda: _encode(folder, 2 if quick else 8, tiny=quick),
    }
    found = measures[name]()
    return {"peak_rss_mib": _peak_rss_mib(), **found}


def _prepare(folder: Path, count: int) -> Part:
    from engine.data.prepare import prepare
    from engine.data.sources import PrepareOptions

    source, pairs, log = folder / f"source-{count}", folder / f"pairs-{count}", folder / f"pieces-{count}.json"
    if not log.is_file():
        write_delivery(source, count)
        log.write_text("[]", encoding="utf-8")
    pieces: list[Part] = json.loads(log.read_text(encoding="utf-8"))
    before = _cut(pairs)
    timed = _timed(lambda: prepare(source, pairs, PrepareOptions(image_size=32), progress=True))
    done = count if pairs.is_dir() else _cut(pairs)
    pieces.append({"from": before, "to": done, **_rates(timed, done - before), "peak_rss_mib": _peak_rss_mib()})
    log.write_text(json.dumps(pieces), encoding="utf-8")
    seconds, cpu_s = (sum(piece[key] for piece in pieces) for key in ("seconds", "cpu_s"))
    found: Part = {"pairs": count, **_rates((seconds, cpu_s), done), "pieces": pieces}
    if done < count:
        return {**found, "unfinished": True}
    report = json.loads((pairs / "report.json").read_text(encoding="utf-8"))
    assert (report["used"], report["set_aside"]) == (count, {}), report
    return {**found, "peak_rss_mib": max(piece["peak_rss_mib"] for piece in pieces)}


def _cut(pairs: Path) -> int:
    """Photographs that an unfinished run has cut, by its journal."""
    journal = pairs.with_name(f".preparing-{pairs.name}") / ".journal" / "cuts.jsonl"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def _read(folder: Path, count: int) -> Part:
    from engine.data.digests import pairs_digests
    from engine.data.pairs import load_pairs

    before = _resident_mib()
    started = time.perf_counter()
    pairs = load_pairs(folder / f"pairs-{count}")
    loaded_s = time.perf_counter() - started
    loaded = _resident_mib()
    started = time.perf_counter()
    pairs_digests(pairs)
    hashed_s = time.perf_counter() - started
    return {
        "pairs": len(pairs),
        "load_s": round(loaded_s, 2),
        "load_mib": round(loaded - before, 1),
        "hash_s": round(hashed_s, 2),
        "hashed_images_per_s": round(count / hashed_s),
    }


def _killed(folder: Path, count: int) -> Part:
    from engine.data.prepare import prepare
    from engine.data.sources import PrepareOptions

    source, options = folder / "source-killed", PrepareOptions(image_size=32)
    write_delivery(source, count)
    prepare(source, folder / "whole", options)
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine.data.prepare import prepare\n"
        "from engine.data.sources import PrepareOptions\n"
        "prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareOptions(image_size=32))\n"
    )
    command = [sys.executable, "-c", code, str(source), str(folder / "resumed")]
    images = folder / ".preparing-resumed" / "images"
    with subprocess.Popen(command, env=child_environment()) as process:
        while not images.is_dir() or len(os.listdir(images)) < count:  # two files a pair
            assert process.poll() is None, "it was not killed in time"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    cut = len(os.listdir(images)) // 2
    prepare(source, folder / "resumed", options)
    return {"pairs": count, "killed_at": cut, "equal": _files(folder / "whole") == _files(folder / "resumed")}


def _files(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.log")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _photo(folder: Path, count: int) -> Part:
    from engine.data.prepare import prepare
    from engine.data.sources import PrepareOptions

    source = folder / "source-photo"
    write_delivery(source, count, size=(800, 1066))
    part: Part = {"pairs": count}
    for form in ("png", "jpg"):
        options = PrepareOptions(image_size=256, image_format=form)
        pairs = folder / f"pairs-photo-{form}"
        part[form] = _rates(_timed(lambda pairs=pairs, options=options: prepare(source, pairs, options)), count)  # type: ignore[misc]
        size = sum(path.stat().st_size for path in (pairs / "images").iterdir())
        part[form]["bytes_a_pair"] = round(size / count)
    return part


def _encode(folder: Path, count: int, *, tiny: bool) -> Part:
    import torch
    from sampling.plan import published_sizes, tiny_sizes

    from engine.data.pairs import load_pairs
    from engine.data.prepare import prepare
    from engine.data.sources import PrepareOptions
    from engine.data.token_encoding import Encoding, write_shards
    from engine.data.tokenizer import train_tokenizer
    from engine.models.vqgan import Vqgan

    config = (tiny_sizes() if tiny else published_sizes())[1]
    torch.manual_seed(0)
    vqgan = Vqgan(config).eval()
    source = folder / "source-encode"
    write_delivery(source, count, size=(400, 533))
    prepare(source, folder / "pairs-encode", PrepareOptions(image_size=config.image_size, validation_fraction=0.05))
    pairs = load_pairs(folder / "pairs-encode")
    tokenizer = train_tokenizer([caption for pair in pairs.all for caption in pair.captions], vocab_size=64)
    with torch.no_grad():
        vqgan.encode(torch.zeros(1, 3, config.image_size, config.image_size))
        encoding = Encoding(
            pairs, tokenizer, vqgan.encode, identity={}, image_size=config.image_size, text_seq_len=64, batch_size=2
        )
        timed = _timed(lambda: write_shards(folder / "shards", encoding))
    tokens = sum(path.stat().st_size for path in (folder / "shards").glob("*/*.npy"))
    rates = _rates(timed, count)
    return {"images": count, "threads": torch.get_num_threads(), **rates, "shard_bytes_a_pair": round(tokens / count)}


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processor time; a signal ends the work."""
    started, cpu = time.perf_counter(), time.process_time()
    with contextlib.suppress(KeyboardInterrupt):
        work()
    return time.perf_counter() - started, time.process_time() - cpu


def _rates(timed: tuple[float, float], count: int) -> Part:
    seconds, cpu_s = timed
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "pairs_per_s": round(count / seconds, 2),
        "pairs_per_cpu_s": round(count / cpu_s, 2),
    }


def _peak_rss_mib() -> int:
    """Not by getrusage, which counts the process that started this one too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---------------------------------------------------------------------------------------------------------- the whole


def _child(part: str, folder: Path, *, quick: bool, limit_s: float) -> Part:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--folder", str(folder)]
    command += ["--quick"] if quick else []
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
        try:
            output, _ = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{part} ended with {child.returncode}: see above")
    found: Part = json.loads(output.splitlines()[-1])
    return found


def _stored(document: dict[str, Any], out: Path | None, *, quick: bool) -> Path:
    folder = out or (REPOSITORY / "runs" / "benchmarks" if quick else REPOSITORY / "benchmarks")
    name = slug(hardware_name(document)) + ("-quick" if quick else "")
    return folder / "results" / "prepare_scale" / f"{name}.json"


def _table(parts: dict[str, Part]) -> str:
    header = ["part", "pairs", "seconds", "pairs/s", "pairs/CPU-s", "peak MiB"]
    rows = []
    for name, part in parts.items():
        values = [part.get(key, "") for key in ("pairs", "seconds", "pairs_per_s", "pairs_per_cpu_s", "peak_rss_mib")]
        rows.append([name, *map(str, values)])
    return table("Preparing with one worker", header, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="comma-separated; default: all")
    parser.add_argument("--out", type=Path, help="folder of results/; default: benchmarks/")
    parser.add_argument(
        "--scratch", type=Path, help="folder of the deliveries (4 GB), which stays; default: a temporary one"
    )
    parser.add_argument("--limit-s", type=float, default=3600.0, help="of one part; prepare-N goes on in the next run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, stored under runs/benchmarks")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (200,) if arguments.quick else SIZES
    every = [f"{name}-{size}" for size in sizes for name in ("prepare", "read")] + ["killed", "photo", "encode"]
    arguments.parts = every if arguments.parts is None else arguments.parts.split(",")
    unknown = [part for part in arguments.parts if part not in every]
    if unknown:
        parser.error(f"--parts: no part {', '.join(unknown)}: choose from {', '.join(every)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
