"""The page's scripts are type-checked from their JSDoc, where node and the pinned TypeScript are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from serve.api.page_files import PAGE_FOLDER
from tests.paths import REPOSITORY

COMPILER = Path(__file__).parent / "typescript" / "node_modules" / "typescript" / "lib" / "tsc.js"
NODE = shutil.which("node")


def _check(folder: Path) -> list[str]:
    """The compiler's errors on a copy of the page."""
    assert NODE is not None
    command = [NODE, str(COMPILER), "-p", str(folder / "jsconfig.json"), "--pretty", "false"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert run.stderr == ""
    return run.stdout.splitlines()


@pytest.fixture
def page_folder(tmp_path: Path) -> Path:
    if NODE is None:
        pytest.skip("node is not installed")
    if not COMPILER.is_file():
        pytest.skip("TypeScript is not installed: make system-packages, or npm ci in tests/serve/page/typescript")
    return Path(shutil.copytree(PAGE_FOLDER, tmp_path / "page"))


def test_the_scripts_agree_with_their_types(page_folder: Path) -> None:
    assert _check(page_folder) == []


def test_the_check_finds_a_wrong_a_missing_and_an_unknown_type(page_folder: Path) -> None:
    faults = {
        "settings.js": ("randomSeed().nothing;", "TS2339"),
        "store.js": ("function untyped(value) { return value; }\nuntyped(1);", "TS7006"),
        "queue.js": ("import { nothing } from './api.js';\nnothing();", "TS2305"),
    }
    for name, (line, _) in faults.items():
        with (page_folder / name).open("a", encoding="utf-8") as script:
            script.write(f"\n{line}\n")
    errors = _check(page_folder)
    assert len(errors) == len(faults)
    for name, (_, code) in faults.items():
        assert [error for error in errors if error.startswith(f"{name}(") and f"error {code}:" in error]


def test_the_compiler_is_pinned() -> None:
    folder = REPOSITORY / "tests" / "serve" / "page" / "typescript"
    assert '"typescript": "5.9.3"' in (folder / "package.json").read_text(encoding="utf-8")
    assert (folder / "package-lock.json").is_file()
