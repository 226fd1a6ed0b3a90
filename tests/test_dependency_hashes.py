"""requirements/*.txt: every file checked by hash, in step with pyproject.toml, constraints.txt and docs/dependencies.md."""

import re
import tomllib
from functools import cache

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import REPOSITORY

FILES = ["build", "torch", "serve", "dev", "after-torch"]


@cache
def _versions(name: str) -> dict[str, str]:
    """Distribution -> exact version, of requirements/<name>.txt."""
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([\w.-]+)==(\S+)(?: ;[^\\\n]*)?((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$", text, re.MULTILINE
    )
    lines = [line for line in text.splitlines() if line and line[0] not in "# "]
    assert len(entries) == len(lines), f"{name}: a line that is not an exact version"
    for distribution, _, hashes in entries:
        assert hashes, f"{name}: {distribution} has no hash"
    return {canonicalize_name(distribution): version for distribution, version, _ in entries}


@cache
def _constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def _declared(*extras: str) -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    declared: dict[str, Requirement] = {canonicalize_name(each.name): each for each in map(Requirement, lines)}
    ours = declared.pop(canonicalize_name(project["name"]), None)
    return declared if ours is None else declared | _declared(*ours.extras)


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    pinned = _constraints()
    differing = {one: version for one, version in _versions(name).items() if pinned.get(one, version) != version}
    assert not differing, "make requirements"


@pytest.mark.parametrize(
    ("extras", "files"),
    [(["serve"], ["serve"]), (["dev"], ["dev", "torch", "after-torch"])],
)
def test_every_declared_package_is_there_in_an_allowed_version(extras: list[str], files: list[str]) -> None:
    versions = {one: version for name in files for one, version in _versions(name).items()}
    for name, requirement in _declared(*extras).items():
        assert name in versions, "make requirements"
        assert requirement.specifier.contains(versions[name]), f"{requirement}: {versions[name]}; make requirements"


def test_development_on_a_processor_fetches_no_cuda_packages() -> None:
    assert not [name for name in _versions("dev") if name.startswith(("nvidia-", "cuda-")) or name == "torch"]


def test_triton_is_the_one_that_torch_requires() -> None:
    """PyPI's torch pins triton exactly: with another one in constraints.txt nothing installs on a machine with a GPU."""
    assert _versions("torch")["triton"] == _constraints()["triton"]


def test_the_documentation_names_every_direct_dependency() -> None:
    text = (REPOSITORY / "docs/dependencies.md").read_text(encoding="utf-8")
    documented = {
        canonicalize_name(row[1]) for row in re.finditer(r"^\| ([\w.-]+) \| [^|]* \| https://", text, re.MULTILINE)
    }
    assert documented == {*_declared("dev"), "taming-transformers-rom1504"}
