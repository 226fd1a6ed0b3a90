"""A wheel of this checkout, and environments that hold it with its declared requirements and nothing else.

Nothing is downloaded: the requirements are links to what the running environment has installed. Which ones is read from
the wheel's own metadata, so that a requirement that is not declared cannot be imported.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from tests.paths import REPOSITORY

_BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "engine", "kernels", "serve", "configs")


def build_wheel(folder: Path) -> Path:
    """The wheel, built offline from a copy: a build leaves folders beside the sources."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in _BUILT_FROM:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run([*command, "--disable-pip-version-check", "-w", str(folder), str(source)], cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@dataclass
class Environment:
    """A virtual environment outside the checkout."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        [found] = (self.folder / "lib").glob("python*/site-packages")
        return found

    def install(self, wheel: Path, *, extras: tuple[str, ...] = ()) -> None:
        """The wheel by pip, its requirements as links."""
        command = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python"), "install", "-q"]
        run([*command, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], cwd=self.folder)
        [metadata] = importlib.metadata.distributions(name="kodalle-engine", path=[str(self.site_packages)])
        for distribution in _closure(metadata.requires or [], extras):
            self.link(distribution)

    def link(self, distribution: str) -> None:
        """Makes an installed distribution importable here."""
        found = importlib.metadata.distribution(distribution)
        assert found.files, distribution
        origin = Path(str(found.locate_file("")))
        for name in {file.parts[0] for file in found.files} - {".."}:
            if (origin / name).exists() and not (self.site_packages / name).exists():
                (self.site_packages / name).symlink_to(origin / name)

    def kodalle(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """One call of the command, with nothing of the checkout in reach."""
        return run([str(self.folder / "bin" / "kodalle"), *arguments], cwd=cwd, check=False)


def make_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder)


def run(command: list[str], *, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment_variables(), capture_output=True, text=True, encoding="utf-8", timeout=300,
        check=check,
    )  # fmt: skip


def environment_variables() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def _closure(requirements: list[str], extras: tuple[str, ...]) -> Iterator[str]:
    """Names of the distributions that pip would install."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), extra) for text in requirements for extra in ("", *extras)]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                more = importlib.metadata.requires(name) or []
                waiting += [(Requirement(text), wanted) for text in more]
    return iter(sorted({name for name, _ in found}))
