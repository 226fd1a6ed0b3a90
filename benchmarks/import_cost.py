"""Time and memory of importing checkpoints at their published sizes: python benchmarks/import_cost.py [--scratch DIR] [--out DIR]

Writes checkpoints of zeros in the layouts of KoDALLE (335 M trained parameters and its VQGAN) and of minDALL-E (1.3 B and its
VQGAN), imports each in a process of its own, and says what that took: seconds, bytes of memory beyond what the program itself
takes, and the size of the largest tensor. The disk takes most of the time: the seconds of a plain copy of the same bytes stand
beside. Needs three times the checkpoint's size on the disk. The last line is one JSON document.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document

from engine.config.codec import VqganConfig
from engine.config.transformer import TransformerConfig
from engine.facts import facts
from engine.files import write_json
from engine.models.folder import expected_shapes

Shapes = dict[str, tuple[int, ...]]
_BLOCK = 8 << 20
_IMPORT = """
import resource, sys, time
from pathlib import Path
from engine.interop.importing import import_checkpoint
import engine.models.folder
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
started = time.perf_counter()
import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
seconds = time.perf_counter() - started
after = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(seconds, time.process_time(), (after - before) * 1024)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=None, help="folder on the disk to use; default: the system's")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON document")
    parser.add_argument("--only", choices=["kodalle", "mindalle"], default=None)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try it")
    arguments = parser.parse_args()
    rows = []
    for name, write in (("kodalle", write_kodalle), ("mindalle", write_mindalle)):
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                rows.append({"checkpoint": name, **measure(write(Path(scratch), arguments.layers), Path(scratch))})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    document = {"benchmark": "import_cost", **facts(torch.device("cpu")), "rows": rows}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "import_cost.json", document)
    print_document(document)
    return 0


def measure(source: Path, scratch: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, str(source), str(scratch / "model")], check=True, capture_output=True, text=True
    )
    seconds, cpu_s, extra = map(float, done.stdout.split())
    written = sum(path.stat().st_size for path in (scratch / "model").iterdir())
    started = time.perf_counter()
    for path in (scratch / "model").glob("*.safetensors"):
        shutil.copyfile(path, scratch / "copy")
        with (scratch / "copy").open("rb") as file:
            os.fsync(file.fileno())
    copy_s = time.perf_counter() - started
    config = json.loads((scratch / "model" / "config.json").read_text(encoding="utf-8"))
    shapes = expected_shapes("transformer", TransformerConfig.model_validate(config["transformer"]))
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    return {
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "seconds": round(seconds, 2),
        "cpu_seconds_with_start": round(cpu_s, 2),
        "copy_seconds": round(copy_s, 2),
        "gb_written": round(written / 1e9, 2),
        "extra_memory_mb": round(extra / 1e6),
        "largest_tensor_mb": round(4 * largest / 1e6),
    }


def write_kodalle(folder: Path, layers: int | None) -> Path:
    config = TransformerConfig(num_layers=layers or 16)
    names = {f"vae.model.{name}": shape for name, shape in expected_shapes("vqgan", VqganConfig()).items()}
    for name, shape in expected_shapes("transformer", config).items():
        axial = {"image_embedding.rows": (1, shape[0], 1, shape[-1]), "image_embedding.columns": (1, 1, *shape)}
        names[_kodalle_name(name)] = axial.get(name, (1, 1, *shape) if name.endswith("scale") else shape)
    hparams = {
        "num_text_tokens": 32000, "text_seq_len": 128, "depth": config.num_layers, "heads": 8, "dim_head": 64, "reversible": False,
        "attn_types": ("full",), "stable": False, "shift_tokens": False, "rotary_emb": False,
    }  # fmt: skip
    write_zeros(folder / "kodalle.pt", {"hparams": hparams, "vae_params": None}, "weights", names)
    return folder / "kodalle.pt"


def _kodalle_name(name: str) -> str:
    tables = {
        "text_embedding.tokens": "text_emb.weight", "text_embedding.positions": "text_pos_emb.weight",
        "image_embedding.tokens": "image_emb.weight", "image_embedding.rows": "image_pos_emb.weights_0",
        "image_embedding.columns": "image_pos_emb.weights_1", "head.norm.weight": "to_logits.0.weight",
        "head.norm.bias": "to_logits.0.bias", "head.weight": "to_logits.1.weight", "head.bias": "to_logits.1.bias",
    }  # fmt: skip
    if name in tables:
        return tables[name]
    _, layer, branch, *rest = name.split(".")
    place = f"transformer.layers.layers.{layer}.{int(branch == 'feed_forward')}."
    leaves = {"qkv": "to_qkv", "out": "to_out.0", "grow": "net.0", "shrink": "net.3"}
    if rest[0] in leaves:
        return f"{place}fn.fn.{leaves[rest[0]]}.{rest[1]}"
    return place + ("scale" if rest == ["scale"] else f"fn.{'.'.join(rest)}")


def write_mindalle(folder: Path, layers: int | None) -> Path:
    dim, length, cells, codes, layers = 1536, 64, 256, 16384, layers or 42
    shapes: Shapes = {
        "tok_emb_img.weight": (codes, dim), "tok_emb_txt.weight": (codes, dim), "pos_emb_img.weight": (cells, dim),
        "pos_emb_txt.weight": (length, dim), "ln_f.weight": (dim,), "ln_f.bias": (dim,), "head_img.weight": (codes, dim),
        "head_txt.weight": (codes, dim),
    }  # fmt: skip
    for layer in range(layers):
        block = f"blocks.{layer}."
        shapes |= {f"{block}ln{n}.{kind}": (dim,) for n in (1, 2) for kind in ("weight", "bias")}
        for part in ("key", "query", "value", "proj"):
            shapes |= {f"{block}attn.{part}.weight": (dim, dim), f"{block}attn.{part}.bias": (dim,)}
        shapes |= {f"{block}mlp.0.weight": (4 * dim, dim), f"{block}mlp.0.bias": (4 * dim,)}
        shapes |= {f"{block}mlp.2.weight": (dim, 4 * dim), f"{block}mlp.2.bias": (dim,)}
    model = folder / "1.3B"
    model.mkdir()
    hparams = {"embed_dim": dim, "n_layers": layers, "n_heads": 24}
    (model / "config.yaml").write_text(json.dumps({"stage1": {}, "stage2": {"hparams": hparams}}), encoding="utf-8")
    write_zeros(model / "stage1_last.ckpt", {}, "state_dict", expected_shapes("vqgan", VqganConfig()))
    write_zeros(model / "stage2_last.ckpt", {}, "state_dict", shapes)
    return model


class _Storage:
    def __init__(self, key: str, numel: int) -> None:
        self.key, self.numel = key, numel


class _Tensor:
    """Pickles as torch's tensors do: a call of its rebuilder over a storage outside the pickle."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        self._arguments: tuple[Any, ...] = (storage, 0, shape, tuple(reversed(strides))[-len(shape) :], False, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        if isinstance(value, _Storage):
            return "storage", torch.FloatStorage, value.key, "cpu", value.numel
        return None


def write_zeros(path: Path, settings: dict[str, Any], key: str, shapes: Shapes) -> None:
    """A file of torch.save whose tensors are zeros, in the memory of a block."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    tensors = {name: _Tensor(_Storage(str(n), sizes[n]), shape) for n, (name, shape) in enumerate(shapes.items())}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(settings | {key: tensors})
        for number, size in enumerate(sizes):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            info.file_size = 4 * size
            with archive.open(info, "w") as file:
                for start in range(0, 4 * size, _BLOCK):
                    file.write(bytes(min(_BLOCK, 4 * size - start)))


if __name__ == "__main__":
    raise SystemExit(main())
