"""The plan for a million pairs is arithmetic on stored and published rates."""

import json
from pathlib import Path

import pytest

from tests.benchmark_scripts import run_script

PHOTO = {"bytes_a_pair": 50_000, "pairs_per_cpu_s": 25.0}


def test_the_plan_follows_from_the_rates(tmp_path: Path) -> None:
    parts = {
        "prepare-10": {"pairs": 10_000, "peak_rss_mib": 80},
        "prepare-100": {"pairs": 100_000, "peak_rss_mib": 170},
        "read-100": {"pairs": 100_000, "load_mib": 150.0, "hashed_images_per_s": 1000.0},
        "photo": {"png": PHOTO, "jpg": {**PHOTO, "bytes_a_pair": 20_000}},
        "encode": {"shard_bytes_a_pair": 700, "pairs_per_cpu_s": 0.25},
    }
    (tmp_path / "m.json").write_text(json.dumps({"commit": "c", "date": "d", "hardware": {}, "parts": parts}))
    answer = run_script("million_pairs", str(tmp_path / "m.json"), "--out", str(tmp_path / "plan.json"))
    plan = json.loads(answer.stdout.splitlines()[-1])
    assert plan == json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["disk_gb"] == {"png": 50.0, "jpg": 20.0, "token_shards": 0.7}
    assert plan["core_hours"] == {"prepare_png": 11.1, "prepare_jpg": 11.1, "encode_on_cpu": 1110.0, "hash": 0.278}
    assert plan["memory_gib"] == {"prepare": 1.04, "pairs_of_a_process": 1.46}
    flops = plan["flops_an_image"]["transformer_training"]
    # 6 FLOPs a parameter and position, and the attention
    assert flops == pytest.approx(6 * 335e6 * 384, rel=0.35)
    on_a100 = plan["gpu_hours_by_published_shares"][1]
    assert on_a100["transformer"] == pytest.approx(5e6 * flops / (312e12 * 0.62) / 3600, rel=0.01)
