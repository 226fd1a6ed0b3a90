"""Importing does nothing but import, and no name of ours hides another's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

ROOMS = ("engine", "kernels", "serve")
FILES = sorted(path.relative_to(REPOSITORY) for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES]

_IMPORT_ALL = """
import importlib, json, logging, os, signal, sys
import torch

def state():
    return {
        "grad": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(),
        "handlers": [repr(handler) for handler in logging.getLogger().handlers], "level": logging.getLogger().level,
        "cuda": torch.cuda.is_initialized(), "group": torch.distributed.is_initialized(),
        "generator": torch.get_rng_state().sum().item(), "signals": [repr(signal.getsignal(n)) for n in (2, 15)],
        "files": sorted(os.listdir(".")), "folder": os.getcwd(), "hook": repr(sys.excepthook),
        "ranks": {name: value for name, value in os.environ.items() if name in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
    }

try:
    import ray  # sets sys.excepthook when it is imported: not ours to mend
except ImportError:
    pass
before, changed, failed = state(), {}, {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = [getattr(error, "name", None), str(error)]
        continue
    after = state()
    if after != before:
        changed[name] = {key: (before[key], after[key]) for key in before if after[key] != before[key]}
        before = after
print("RESULT" + json.dumps({"changed": changed, "failed": failed}))
"""
# Extras that a machine may lack: their importers are skipped there, and nowhere else.
_OPTIONAL = {"ray", "fastapi", "uvicorn", "triton", "xformers", "onnxruntime", "onnx", "starlette", "httpx"}
_OPTIONAL |= {"prometheus_client", "python_multipart"}


@pytest.mark.slow
def test_every_module_imports_without_side_effects(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, json.dumps(MODULES)],
        cwd=tmp_path,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.partition("RESULT")[2])
    failed = {name: why for name, why in found["failed"].items() if (why[0] or "").partition(".")[0] not in _OPTIONAL}
    assert failed == {}
    assert found["changed"] == {}


def test_no_file_is_named_like_a_standard_module() -> None:
    """`deepspeed engine/train.py` puts engine/ first on sys.path: a file `types.py` there would shadow the standard module."""
    assert [str(path) for path in FILES if path.stem in sys.stdlib_module_names and path.stem != "__init__"] == []
    assert [str(path.parent) for path in FILES if path.parent.name in sys.stdlib_module_names] == []


def test_rooms_hold_no_stray_scripts() -> None:
    """Entry scripts hold functions only: importing them must not run them."""
    for name in ("engine/train.py", "engine/cli.py"):
        assert 'if __name__ == "__main__":' in (REPOSITORY / name).read_text(encoding="utf-8")


def test_a_foreign_package_named_kernels_is_named_as_the_fault(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    answer = subprocess.run(
        [sys.executable, "-c", "import engine"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("ImportError: `import kernels` found")
    assert "pip uninstall kernels" in last
