"""What a fresh process imports: nothing heavy before a command's arguments are checked, nothing for a picture that it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

MODEL = "models/clothing"
# Seconds of imports that a picture of a shipped model does not need.
UNNEEDED = (
    "transformers", "sympy", "scipy", "sklearn", "torch._dynamo", "torch._inductor", "torchvision", "triton", "onnx", "onnxruntime",
    "huggingface_hub", "deepspeed", "ray", "rich", "pandas", "matplotlib", "engine.codec.vqgan_cuda", "engine.decoding.cuda",
    "engine.config.stages", "engine.interop", "engine.training", "engine.metrics",
)  # fmt: skip

_CALLS = """
import contextlib, io, json, sys
from engine import cli

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise AssertionError(f"{sys.argv} imports torch")

sys.meta_path.insert(0, Blocked())
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["kodalle", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            cli.main()
        except SystemExit as ended:
            said.append([ended.code, errors.getvalue()])
print(json.dumps(said))
"""
_GENERATE = ["generate", MODEL, "a"]
REFUSED: dict[str, list[list[str]]] = {
    "--seed": [[*_GENERATE, "--seed", "-1"]],
    "--top": [[*_GENERATE, "--candidates", "2", "--top", "3"]],
    "--device": [
        [*_GENERATE, "--device", "gpu"], ["continue", MODEL, "a", "--device", "tpu"],
        ["evaluate", MODEL, "models", "--device", "gpu"], ["calibrate", MODEL, "models", "--device", "gpu"],
        ["train-classifier", "models", "--out", "x", "--device", "gpu"],
    ],
    "--rank-by": [[*_GENERATE, "--rank-by", "beauty"]],
    "--weights": [[*_GENERATE, "--weights", "int2"]],
    "--codec-backend": [[*_GENERATE, "--codec-backend", "auto"]],
    "--size": [[*_GENERATE, "--size", "big"], [*_GENERATE, "--size", "256x256", "--enlarge", "300"]],
    "--enlarge": [[*_GENERATE, "--enlarge", "100"]],
    "--transparent": [["generate", "models/garments", "a", "--transparent"]],
    "--keep-rows": [[*_GENERATE, "--keep-rows", "3"]],
    "--image": [[*_GENERATE, "--image", "no.png"]],
    "--out": [
        [*_GENERATE, "--out", "README.md"], ["export", MODEL, "--out", "README.md"],
        ["evaluate", MODEL, "models", "--out", "sheet.png"], ["evaluate", MODEL, "models", "--out", "models"],
    ],
    "--refine-step-size": [[*_GENERATE, "--refine-step-size", "0.1"]],
    "--from": [["generate", "--from", "README.md"]],
    "--metrics": [["evaluate", MODEL, "models", "--metrics", "beauty"]],
    "--clip": [["evaluate", MODEL, "models", "--clip", "nowhere"]],
    "CAPTION": [["generate", MODEL]],
    "caption": [["generate", MODEL, " "]],
    "model folder": [
        ["generate", "nowhere", "a"], ["continue", "nowhere", "a"], ["evaluate", "nowhere", "models"], ["calibrate", "nowhere", "models"],
        ["export", "nowhere"], ["convert", "nowhere", "x"], ["generate", "configs", "a"],
    ],
    "pairs": [["evaluate", MODEL, "nowhere"], ["calibrate", MODEL, "nowhere"], ["train-classifier", "nowhere", "--out", "x"]],
    "destination": [["convert", MODEL, MODEL], ["convert", MODEL, "configs"], ["import", "README.md", "configs"]],
    "source": [["import", "nowhere", "x"]],
    "FOLDER": [["push", "nowhere", "a/b"]],
    "name": [["push", MODEL, "ab"]],
    "config": [["train", "nowhere"]],
    "--minutes": [["train", "nowhere", "--minutes", "3"]],
    "--configs": [["demo", "--configs", "docs"]],
    "--host": [["serve", MODEL, "--host", "nowhere.invalid."]],
}  # fmt: skip


def test_arguments_are_refused_before_torch_is_imported() -> None:
    """Of every command that imports torch; a process each would take a minute."""
    expected = [(field, arguments) for field, each in REFUSED.items() for arguments in each]
    calls = json.dumps([arguments for _, arguments in expected])
    done = subprocess.run(
        [sys.executable, "-c", _CALLS, calls], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for (field, arguments), (code, said) in zip(expected, json.loads(done.stdout), strict=True):
        assert (code, said.count("\n")) == (2, 1), (arguments, said)
        assert said.startswith(f"error: {field}: "), (arguments, said)


@pytest.mark.slow
def test_a_picture_needs_no_more_than_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from engine.commands.generate import generate_to_folder
from pathlib import Path
params = dict(candidates=1, top=1, temperature=0)
generate_to_folder({MODEL!r}, "블루", Path({str(tmp_path)!r}), sampling_params=params)
print(*(name for name in {UNNEEDED!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert (tmp_path / "result.json").is_file()
