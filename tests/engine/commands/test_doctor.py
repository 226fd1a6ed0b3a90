"""What `kodalle doctor` reports: this machine as it is, what is missing, what listens, what is installed wrongly."""

import json
import socket

import pytest
import torch
from typer.testing import CliRunner

from engine import cli
from engine.codec.compiled_convolution import convolution_library
from engine.commands import doctor
from engine.decoding.cpu.compiled_step import library
from engine.device import compiled_set, cpu_capabilities


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor", *arguments])
    return result.exit_code, result.stdout


def test_the_report_is_this_machines() -> None:
    code, text = _run("--json")
    report = json.loads(text)
    assert code == (1 if report["problems"] else 0)
    assert report["versions"]["torch"] == torch.__version__
    assert report["processor"]["name"] == cpu_capabilities().name
    assert report["processor"]["instruction_set"] == cpu_capabilities().isa
    assert ("bfloat16" in report["processor"]["packs"]) == cpu_capabilities().packs_bfloat16
    assert report["processor"]["decode_step"] == doctor._compiled(compiled_set(), is_built=library() is not None)
    assert report["processor"]["codec"] == doctor._compiled(compiled_set(), is_built=convolution_library() is not None)
    assert report["dtype_of_a_large_model"]["cpu"] in ("float32", "bfloat16")
    assert "sdpa" in report["backends"]["cpu"]["attention"]
    assert "xformers" not in report["backends"]["cpu"]["attention"]
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_what_is_not_compiled_says_why() -> None:
    assert doctor._compiled("avx2", is_built=True) == "compiled"
    assert doctor._compiled("avx2", is_built=False).endswith("built without a C++ compiler")
    assert doctor._compiled(None, is_built=False).endswith("the processor has no AVX2")


def test_the_table_has_what_the_json_has() -> None:
    report = json.loads(_run("--json")[1])
    table = _run()[1]
    for value in [*filter(None, report["versions"].values()), report["processor"]["name"], *report["problems"]]:
        assert value in table, value
    for listener in report["listeners"]:
        assert str(listener["port"]) in table


def test_missing_packages_are_named_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._PACKAGES, "deepspeed", ("no-such-distribution",))
    assert doctor.diagnose()["versions"]["deepspeed"] is None
    line = next(line for line in _run()[1].splitlines() if line.split()[:1] == ["deepspeed"])
    assert line.split(maxsplit=1)[1] == "not installed"


def test_a_port_in_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORTS", {port: "a test"})
        assert doctor.diagnose()["listeners"] == [{"port": port, "of": "a test", "is_listening": True}]
    assert doctor.diagnose()["listeners"] == [{"port": port, "of": "a test", "is_listening": False}]


def test_the_foreign_package_kernels_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.9" if name == "kernels" else version(name))
    code, table = _run()
    assert code == 1
    assert "run `pip uninstall kernels`" in table
