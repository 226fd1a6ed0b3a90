import inspect
import json
import resource
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from engine.commands import data as cli_data
from engine.commands.data import app
from engine.data.pairs import load_pairs
from engine.data.sources import PrepareOptions
from engine.errors import InputError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    result = run("make-demo", folder, "--count", 3, "--seed", 1, "--image-size", 32)
    assert result.exit_code == 0, result.output
    assert "train: 3" in result.output
    return folder


def first_label(demo: Path) -> tuple[Path, dict[str, Any]]:
    path = sorted((demo / "train" / "labels").iterdir())[0]
    return path, json.loads(path.read_text(encoding="utf-8"))


def test_captions_prints_one_line_a_file(demo: Path) -> None:
    files = sorted((demo / "train" / "labels").iterdir())
    result = run("captions", *files)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == len(files)
    assert all(line.endswith("이다.") for line in lines)


def test_captions_options(demo: Path, tmp_path: Path) -> None:
    _, content = first_label(demo)
    content["데이터셋 정보"]["데이터셋 상세설명"]["라벨링"] = {
        "스타일": [{"스타일": "로맨틱"}],
        "아우터": [{"색상": "라벤더", "카테고리": "가디건", "소재": ["니트", "면"]}],
        "하의": [{"색상": "블랙"}],
    }
    content["데이터셋 정보"]["데이터셋 상세설명"] |= {"렉트좌표": {}, "폴리곤좌표": {}}
    path = tmp_path / "1.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    options = ("--no-style", "--subject-once", "--per-garment", "--list-values", "first")
    assert run("captions", path, *options).stdout.splitlines() == [
        "아우터에서 색상은 라벤더이다. 카테고리는 가디건이다. 소재에는 니트이다.",
        "하의에서 색상은 블랙이다.",
    ]
    assert run("captions", path).stdout.startswith("스타일에서 스타일은 로맨틱이다. 아우터에서 색상은 라벤더이다.")


def test_captions_of_an_empty_label(demo: Path, tmp_path: Path) -> None:
    _, content = first_label(demo)
    content["데이터셋 정보"]["데이터셋 상세설명"] |= {"라벨링": {}, "렉트좌표": {}, "폴리곤좌표": {}}
    (tmp_path / "1.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for option in ("--style", "--per-garment"):
        result = run("captions", tmp_path / "1.json", option)
        assert "no labelled object" in result.stderr
    assert run("captions", tmp_path / "1.json").stdout == "\n"


def test_prepare_prints_its_summary(demo: Path, tmp_path: Path) -> None:
    result = run("prepare", demo, tmp_path / "out", "--image-size", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    pairs = load_pairs(tmp_path / "out")
    assert f"{len(pairs)} used, 0 set aside" in result.stdout
    assert f"{len(pairs.train)} pairs to train on, {len(pairs.validation)} for validation" in result.stdout
    with Image.open(pairs.all[0].image_path) as image:
        assert image.size == (16, 16)


def test_the_demo_set_has_outlines_to_cut_out(demo: Path, tmp_path: Path) -> None:
    result = run("prepare", demo, tmp_path / "out", "--cut-out", "--image-size", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert f"{len(load_pairs(tmp_path / 'out'))} used, 0 set aside" in result.stdout


def test_prepare_has_the_defaults_of_its_options() -> None:
    parameters = inspect.signature(cli_data.prepare).parameters
    others = ("source", "destination", "strict", "workers")  # arguments of the run itself
    assert {name: p.default for name, p in parameters.items() if name not in others} == PrepareOptions().to_json()


def test_prepare_names_what_it_sets_aside(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red").save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("옷" if name == "a" else "", encoding="utf-8")
    arguments = ("prepare", source, tmp_path / "out", "--max-bad", 0.5, "--validation-fraction", 0, "--workers", 1)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "empty_caption: 1, the first: b.png" in result.stdout
    strict = run(*arguments[:2], tmp_path / "out2", "--strict")
    assert isinstance(strict.exception, InputError)  # `kodalle` turns it into one line and exit code 2
    assert not (tmp_path / "out2").exists()


def test_check_exit_codes_and_json(demo: Path, tmp_path: Path) -> None:
    clean = run("check", demo, "--workers", 1)
    assert (clean.exit_code, "nothing found" in clean.stdout) == (0, True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("", encoding="utf-8")
    result = run("check", tmp_path, "--json", tmp_path / "report.json", "--names", 2, "--workers", 1)
    assert result.exit_code == 1
    assert "empty_caption  a.txt" in result.stdout
    assert "and 1 more" in result.stdout
    assert "3 errors, 2 warnings" in result.stdout
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["counts"] == {"empty_caption": 3, "duplicate_image": 2}
    assert len(written["findings"]) == 5


def test_a_folder_is_no_place_for_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.check.check", lambda *_, **__: pytest.fail("checked before the place was tried"))
    result = run("check", tmp_path, "--json", tmp_path)
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == f"--json: {tmp_path}: is a folder: give the name of a file"


@pytest.mark.parametrize("place", ["loop", "loop/x", "file", "file/x", "n" * 300])
def test_no_place_is_a_traceback(tmp_path: Path, place: str) -> None:
    (tmp_path / "source").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "source" / "a.png")
    (tmp_path / "source" / "a.txt").write_text("옷", encoding="utf-8")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for command in (("prepare", tmp_path / "source"), ("make-demo",)):
        error = run(*command, tmp_path / place).exception
        assert isinstance(error, InputError), repr(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "source"]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in range(6):
        Image.effect_noise((64, 64), 90).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("옷", encoding="utf-8")
    arguments = ("prepare", source, tmp_path / "out", "--validation-fraction", 0, "--workers", 1, "--image-size", 64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        result = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(result.exception, InputError)
    assert "File too large: raise the limit on the size of a file; run the same command to go on" in str(
        result.exception
    )
    assert not (tmp_path / "out").exists()
    assert run(*arguments).exit_code == 0
    assert len(load_pairs(tmp_path / "out")) == 6


@pytest.mark.parametrize("command", [("captions",), ("check",), ("prepare", "out")])
def test_bad_input_leaves_as_input_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    result = run(name, tmp_path / "none", *(tmp_path / part for part in rest))
    assert isinstance(result.exception, InputError)
    assert "none" in str(result.exception)


def test_usage_errors_exit_2() -> None:
    assert run("prepare").exit_code == 2
    assert run("captions", "x.json", "--list-values", "some").exit_code == 2
