"""Every import is declared where it is needed, and everything that is declared is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from engine.commands.missing_packages import EXTRA_OF_MODULE, as_input_error
from tests.paths import REPOSITORY

# Longest prefix first: the extras that a folder's files may import from, beside the core requirements.
EXTRAS_OF_FOLDER = {
    "engine/training": {"train"},
    "engine/metrics/fid.py": {"train"},
    "engine/commands/train.py": {"train"},
    "engine/codec": {"onnx"},
    "engine/models/attention.py": {"gpu"},
    "engine/models/efficientnet_lite0.py": {"train"},
    "engine/decoding/cuda": {"gpu"},
    "engine": set[str](),
    "kernels": {"gpu"},
    "serve/scheduling": set[str](),
    "serve/mcp_server.py": {"mcp"},
    "serve/worker/content_credentials.py": {"c2pa", "serve"},
    "serve": {"serve"},
    "benchmarks": {"train", "serve", "mcp", "onnx", "gpu", "dev"},
    "tests": {"train", "serve", "mcp", "c2pa", "onnx", "gpu", "dev"},
}
OURS = {"engine", "kernels", "serve", "tests"}
# taming: see pyproject.toml. torchvision: looked for, never needed (engine/models/environment.py). dalle_pytorch: a baseline.
# kiwipiepy: one benchmark's language model.
NEVER_DECLARED = {"taming", "torchvision", "dalle_pytorch", "kiwipiepy"}
# Of requirements that no file imports: who calls for them.
NEVER_IMPORTED = {
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "mypy": "make lint",
    "import-linter": "make lint",
    "types-pyyaml": "mypy",
    "setuptools": "tests/package_environment.py builds the wheel",
    "wheel": "tests/package_environment.py builds the wheel",
    "uv": "make requirements",
}
# Modules that others import for us.
THROUGH = {"torch.utils.tensorboard": "tensorboard"}


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return _normal(found[0])


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def _declared() -> dict[str, set[str]]:
    """Extra -> distributions; "" for the core."""
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: {_name(one) for one in ones} for name, ones in project["optional-dependencies"].items()}
    return {"": {_name(one) for one in project["dependencies"]}} | extras


@cache
def _distributions_of_modules() -> dict[str, set[str]]:
    return {module: {_normal(one) for one in ones} for module, ones in packages_distributions().items()}


def _imported(file: Path) -> Iterator[str]:
    """Full names of imported modules, also of those that are imported by name on use."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "require", "importorskip"):
                yield str(node.args[0].value)


def _files() -> list[str]:
    return sorted(
        str(path.relative_to(REPOSITORY))
        for folder in ("engine", "kernels", "serve", "benchmarks", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
    )


@cache
def _foreign(file: str) -> set[str]:
    """Top-level modules of others that a file imports."""
    found = {THROUGH.get(module, module.partition(".")[0]) for module in _imported(REPOSITORY / file)}
    siblings = {
        path.stem for path in (REPOSITORY / "benchmarks").iterdir()
    }  # benchmarks import each other by file name
    return found - sys.stdlib_module_names - OURS - (siblings if file.startswith(("benchmarks", "tests")) else set())


def _allowed(file: str) -> set[str]:
    prefix = max((one for one in EXTRAS_OF_FOLDER if file.startswith(one)), key=len)
    return _declared()[""].union(*(_declared()[extra] for extra in EXTRAS_OF_FOLDER[prefix]))


@pytest.mark.parametrize("folder", ["engine", "kernels", "serve", "benchmarks", "tests"])
def test_imports_are_declared(folder: str) -> None:
    undeclared = {
        (file, module)
        for file in _files()
        if file.startswith(folder + "/")
        for module in _foreign(file) - NEVER_DECLARED
        if not _distributions_of_modules().get(module, {_normal(module)}) & _allowed(file)
    }
    assert undeclared == set()


def test_declared_requirements_are_imported() -> None:
    imported = {module for file in _files() for module in _foreign(file)}
    provided = {one for module in imported for one in _distributions_of_modules().get(module, {_normal(module)})}
    declared = set().union(*_declared().values()) - {"kodalle-engine"}
    assert declared - provided - set(NEVER_IMPORTED) == set()
    assert not set(NEVER_IMPORTED) & provided


def test_core_and_extras_do_not_overlap() -> None:
    """`pip install .` alone must not bring what an extra is for."""
    assert not _declared()[""] & {"deepspeed", "ray", "torchmetrics", "tensorboard", "onnxruntime-gpu", "triton"}
    for extra, names in _declared().items():
        assert not extra or not names & _declared()[""], extra


def test_constraints_pin_every_declared_requirement() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_name(line) for line in lines if "==" in line}
    declared = set().union(*_declared().values()) - {"kodalle-engine"}
    assert declared - pinned == set()
    assert "taming-transformers-rom1504" in pinned


@pytest.mark.parametrize("extra", ["train", "serve", "mcp"])
def test_every_module_of_an_extra_has_its_remedy(extra: str) -> None:
    """A module that is imported when its file is, and missing, must end in one line."""
    modules = {module for file in _files() if file.startswith(("engine/", "serve/")) for module in _foreign(file)}
    of_extra = {one for one in modules if _distributions_of_modules().get(one, set()) & _declared()[extra]}
    assert {module for module, name in EXTRA_OF_MODULE.items() if name == extra} == of_extra


def test_remedies_are_shell_commands() -> None:
    assert str(as_input_error(ModuleNotFoundError("…", name="ray.serve"))) == (
        "ray: not installed: pip install 'kodalle-engine[serve]'"
    )
    assert "--no-deps" in str(as_input_error(ModuleNotFoundError("…", name="taming")))
    assert as_input_error(ModuleNotFoundError("…", name="engine.missing")) is None
    assert as_input_error(ModuleNotFoundError("…")) is None
