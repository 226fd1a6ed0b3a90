"""log.jsonl has each step once, also after a kill."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.training.run_log import RunLog


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_lines_come_in_order_and_in_full(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_step=0)
    for step in (1, 2):
        log.scalars(step, {"loss": torch.tensor(1.0 / step), "lr": 1e-3})
    log.validation(2, {"loss": 0.25})
    log.scalars(3, {"loss": 1 / 3})
    log.close()
    log.close()
    assert _lines(tmp_path) == [
        {"step": 1, "loss": 1.0, "lr": 0.001},
        {"step": 2, "loss": 0.5, "lr": 0.001},
        {"step": 2, "validation_loss": 0.25},
        {"step": 3, "loss": 0.3333333},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_lines_are_read_when_the_log_is_flushed_not_before(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_step=0)
    loss = torch.tensor(1.0)
    log.scalars(1, {"loss": loss, "seconds": lambda: float(loss) / 4})
    loss.fill_(2.0)
    assert _lines(tmp_path) == []
    log.flush()
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.0, "seconds": 0.5}]
    log.close()


def test_resuming_cuts_the_steps_that_run_again(tmp_path: Path) -> None:
    good = [f'{{"step": {step}, "loss": 1.0}}' for step in (1, 2, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join([*good, "[]", "7", '{"step": 5, "lo']))
    RunLog(tmp_path, resume_step=3).close()
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 2, 3]
    RunLog(tmp_path, resume_step=0).close()
    assert _lines(tmp_path) == []


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    log = RunLog(tmp_path, resume_step=1)
    log.scalars(2, {"loss": 2.0})
    log.close()
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "none", resume_step=0, enabled=False)
    log.scalars(1, {"loss": 1.0})
    log.validation(1, {"loss": 1.0})
    log.image(1, Image.new("RGB", (2, 2)))
    log.flush()
    log.close()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [(4, 4), (6, 3)])
def test_images_keep_their_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    log = RunLog(tmp_path, resume_step=0)
    log.image(12, Image.new("RGB", size, "red"))
    log.close()
    with Image.open(tmp_path / "samples" / "step-00000012.png") as image:
        assert image.size == size


def test_disk_fault_in_tensorboards_thread_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call of its writer raises it where it is reported."""
    printed: list[threading.ExceptHookArgs] = []
    hook = printed.append
    monkeypatch.setattr(threading, "excepthook", hook)
    log = RunLog(tmp_path, resume_step=0)
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")):
        thread = threading.Thread(target=_raise, args=(error,))
        thread.start()
        thread.join()
    log.close()
    assert threading.excepthook is hook
    assert [str(one.exc_value) for one in printed] == ["a bug"]


def _raise(error: Exception) -> None:
    raise error
