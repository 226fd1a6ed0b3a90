"""The sampling benchmark on a tiny model: it runs, its figures add up, and the baselines' loops sample our tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import measure
from engine.decoding.sampler import Sampler
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    """As when Python runs a script: its folder is where its neighbours are found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def document(out: Path) -> dict[str, Any]:
    """The document on the last line of a quick run."""
    answer = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "sample_speed.py"), "--quick", "--repeat", "1", "--dtype", "float32",
            "--out", str(out),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def _rows(document: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["what"] == what]


def test_what_is_printed_is_stored(document: dict[str, Any], out: Path) -> None:
    (stored,) = (out / "results" / "sample_speed").glob("*-quick.json")
    assert json.loads(stored.read_text(encoding="utf-8")) == document
    (plot,) = (out / "plots").glob("sample_speed-*-quick.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_run_states_where_it_was_made(document: dict[str, Any]) -> None:
    keys = {"benchmark", "commit", "date", "hardware", "versions", "threads", "config", "rates", "rows", "published"}
    assert keys <= document.keys()
    assert document["versions"]["torch"] == torch.__version__
    assert document["threads"] == 1
    assert document["failed"] == {}
    if not torch.cuda.is_available():
        assert document["gpu"] == "not measured"


def test_phases_sum_to_the_total(document: dict[str, Any]) -> None:
    ours = _rows(document, "ours")
    assert [row["images"] for row in ours] == [1, 4]
    for row in ours:
        assert row["phases_s"].keys() == {"prefill", "decode", "vqgan", "ranking", "encoding"}
        assert all(seconds > 0 for seconds in row["phases_s"].values())
        assert sum(row["phases_s"].values()) == pytest.approx(row["total_s"], rel=0.05, abs=0.02)
        assert row["tokens_per_s"] * row["tokens_s"] == pytest.approx(row["images"] * 16)
        assert row["floor_s"].keys() == {"prefill", "decode", "vqgan", "ranking"}
        for phase, floor_s in row["floor_s"].items():
            assert row["share_of_roofline"][phase] == pytest.approx(floor_s / row["phases_s"][phase])
        assert row["share_of_roofline"]["total"] == pytest.approx(sum(row["floor_s"].values()) / row["total_s"])
        assert 0 < row["share_of_roofline"]["decode"] < 1
        assert row["peak_memory_bytes"] > 50e6
    assert ours[0]["bytes_per_step"] < ours[1]["bytes_per_step"]


def test_others_are_beside_it(document: dict[str, Any]) -> None:
    assert {(row["against"], row["images"]) for row in document["ratios"] if row["against"] != "dalle-pytorch"} == {
        ("uncached", 1), ("uncached", 4), ("cached", 1), ("cached", 4)
    }  # fmt: skip
    for row in document["ratios"]:
        ours = next(mine for mine in _rows(document, "ours") if mine["images"] == row["images"])
        theirs = next(it for it in _rows(document, row["against"]) if it["images"] == row["images"])
        assert row["tokens"] == pytest.approx(theirs["tokens_s"] / ours["tokens_s"])
    assert document["equal_tokens"]["float32"] == {"equal": 64, "compared": 64}
    (prefill,) = _rows(document, "prefill")
    assert prefill["share_of_work"] == 1 / 4
    (guidance,) = _rows(document, "guidance")
    assert guidance["ratio"] == pytest.approx(guidance["decode_s"] / guidance["unguided_decode_s"])
    assert all(row["kind"] == "published, other hardware" for row in document["published"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float12"], "float12 is none of float32, bfloat16, float16, int8"),
        (["--only", "theirs"], "theirs is none of ours"),
        (["--repeat", "0"], "must be 1 or more"),
    ],
)
def test_impossible_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sample_speed

    monkeypatch.setattr(sys, "argv", ["sample_speed.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        sample_speed.main()
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the baselines


@pytest.fixture(scope="module")
def model() -> KoDalle:
    from sampling.plan import tiny_sizes

    torch.manual_seed(1)
    return KoDalle(tiny_sizes()[0], embedding_std=0.5).eval()


@pytest.fixture(scope="module")
def caption() -> torch.Tensor:
    return torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1, 1, 1, 1, 1]])


def test_the_ancestors_loop_samples_our_tokens(model: KoDalle, caption: torch.Tensor) -> None:
    """No cache and the joint head on each position, with our noise: the same function."""
    from sampling.baselines import sample_uncached

    ours = Sampler(model).generate(
        caption, [SequenceRequest(0, SamplingParams(seed=5), candidate=number) for number in range(3)]
    )
    assert torch.equal(sample_uncached(model, caption, seed=5, candidates=range(3), num_tokens=16), ours)
    other = sample_uncached(model, caption, seed=6, candidates=range(3), num_tokens=16)
    assert not torch.equal(other, ours)


def test_text_is_never_sampled(model: KoDalle, caption: torch.Tensor) -> None:
    from sampling.baselines import uncached_logits

    with torch.inference_mode():
        logits = uncached_logits(model, caption, torch.zeros(1, 3, dtype=torch.int64))
    hidden = logits == -torch.finfo(logits.dtype).max
    assert hidden[:, : model.head.num_text_rows].all()
    assert not hidden[:, model.head.num_text_rows :].any()


def test_the_plain_cached_loop_is_the_same_model(model: KoDalle, caption: torch.Tensor) -> None:
    from sampling.baselines import cached_logits, empty_cache, sample_cached, uncached_logits

    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(2))
    captions = caption.expand(2, -1)
    with torch.inference_mode():
        cache = empty_cache(model, 2)
        logits = [cached_logits(model, model.embed_prefix(captions), cache)]
        for position in range(6):
            x = model.image_embedding(tokens)[:, position : position + 1]
            logits.append(cached_logits(model, x, cache))
        for sampled, found in enumerate(logits):
            expected = uncached_logits(model, captions, tokens[:, :sampled])[:, model.head.num_text_rows :]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cache.length == model.config.prefix_len + 6
    sampled_tokens = sample_cached(model, caption, num_sequences=3)
    assert sampled_tokens.shape == (3, 16)
    assert int(sampled_tokens.max()) < 32


def test_steps_timed_at_lengths_agree_with_whole_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes time in proportion to its length, timed at three lengths and summed over all."""
    from sampling.baseline_rows import at_lengths, spread_evenly

    spent_s: list[float] = []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: sum(spent_s)))
    step_after = lambda count: lambda: spent_s.append(1e-4 * (10 + count))
    counts = spread_evenly(0, 20, 3)
    assert counts == [0, 10, 20]
    row = at_lengths(step_after, counts, 10, torch.device("cpu"), repeat=3)
    assert row["lengths"] == [10, 20, 30]
    assert row["method"] == "measured at 3 lengths, integrated"
    assert row["tokens_s"] == pytest.approx(1e-4 * sum(range(10, 31)))
    assert spread_evenly(0, 255, 9) == [0, 32, 64, 96, 128, 159, 191, 223, 255]


# ----------------------------------------------------------------------------------------------------------- the report


def test_ratios() -> None:
    from sampling.report import ratios

    phases = {"prefill": 1.0, "decode": 3.0, "vqgan": 2.0, "ranking": 50.0, "encoding": 0.0}
    ours = {"what": "ours", "variant": "float32", "images": 1, "phases_s": phases, "tokens_s": 4.0}
    theirs = {"what": "uncached", "variant": "float32", "images": 1, "tokens_s": 40.0, "method": "measured whole"}
    absent = {"what": "dalle-pytorch", "variant": "float32", "images": 1, "method": "not installed"}
    (row,) = ratios([ours, theirs, absent])
    assert (row["tokens"], row["with_codec"]) == (10, 7)


def test_published_figures() -> None:
    from sampling.report import published_rows

    by_name = {(row["system"], row["hardware"]): row for row in published_rows()}
    assert by_name["KoDALLE", "P100"]["seconds_per_image"] == 13.5
    assert by_name["KoDALLE", "A100"]["seconds_per_image"] == pytest.approx(0.78, abs=0.01)
    assert by_name["minDALL-E 1.3B", "V100"]["seconds_per_image"] is None
    assert all(row["source"] and row["covers"] for row in by_name.values())
    assert all(row["seconds_per_image"] for row in by_name.values() if row["plot"])


def test_table() -> None:
    from text_table import seconds_text, table

    text = table("title", ["name", "s", "note"], [["a", "1.5", "x"], ["longer", "20", "yy"]])
    assert text.splitlines() == ["title", "name      s  note", "a       1.5  x", "longer   20  yy"]
    assert [seconds_text(value) for value in (None, 0.00123, 0.5, 1, 12.34, 123.4, 9120.4)] == [
        "-", "1.23 ms", "500 ms", "1.00 s", "12.3 s", "123 s", "9,120 s"
    ]  # fmt: skip


def test_names_of_files() -> None:
    from machine_facts import slug

    assert slug("2 cores of Intel(R) Xeon(R) CPU @ 2.50GHz") == "2-cores-of-intel-xeon-2.50ghz"
    assert slug("NVIDIA H200") == "nvidia-h200"


def test_plans_travel() -> None:
    from sampling.plan import SamplingPlan

    plan = SamplingPlan(
        model="m", device="cpu", variant="float32", parts=("ours",), repeat=1, row_budget_s=1, candidates=4,
        lengths_one=0, lengths_many=0, rate_seconds=0.1, rate_bytes=None,
    )  # fmt: skip
    assert SamplingPlan.from_json(plan.to_json()) == plan


def test_gpu_suite_without_a_gpu_ends_in_one_line(tmp_path: Path) -> None:
    answer = subprocess.run(
        [str(BENCHMARKS / "gpu_suite.sh"), str(tmp_path / "out")],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 2
    assert (answer.stdout, answer.stderr) == (
        "",
        "gpu_suite: no CUDA device is visible to torch: nothing to measure here\n",
    )
    assert not (tmp_path / "out").exists()
