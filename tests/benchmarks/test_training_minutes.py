"""Minutes of trainings are the sum over their logged steps."""

import json
from pathlib import Path

from tests.benchmark_scripts import run_script


def test_minutes_are_summed_over_steps_without_validations(kodalle_run: Path, tmp_path: Path) -> None:
    config = (kodalle_run / "config.yaml").read_bytes()
    for stage, rates in {"vqgan": [1.0, 0.5], "koclip": [0.25], "kodalle": [2.0, 2.0, 1.0]}.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").write_bytes(config)
        steps = [{"step": number, "images_per_s": rate} for number, rate in enumerate(rates, start=1)]
        lines = [*steps, {"step": 1, "validation_loss": 1.0}]
        (tmp_path / stage / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "training.json"
    runs = [str(tmp_path / stage) for stage in ("vqgan", "koclip", "kodalle")]
    printed = run_script("training_minutes", *runs, "--out", str(out)).stdout
    document = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == document
    assert document.keys() >= {"commit", "hardware", "versions"}
    stages = document["stages"]
    assert {name: found["steps"] for name, found in stages.items()} == {"vqgan": 2, "koclip": 1, "kodalle": 3}
    per_image_s = {"vqgan": 3.0, "koclip": 4.0, "kodalle": 2.0}
    for name, found in stages.items():
        assert found["minutes"] == round(found["images"] * per_image_s[name] / 60, 1) > 0
