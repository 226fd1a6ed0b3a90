"""Thread priorities."""

import os
import sys
import threading

import pytest
import torch

from serve.process import lower_thread_priority


def nice(thread_id: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread_id)


@pytest.mark.skipif(sys.platform != "linux", reason="nice values of threads are Linux's")
def test_a_compute_thread_and_the_threads_it_starts_have_a_lower_priority() -> None:
    found: dict[str, list[int]] = {}
    before = {int(name) for name in os.listdir("/proc/self/task")}

    def compute() -> None:
        lower_thread_priority()
        threads = torch.get_num_threads()
        torch.set_num_threads(2)  # of this process; the team is the calling thread's own
        torch.randn(512, 512) @ torch.randn(512, 512)
        torch.set_num_threads(threads)
        started = {int(name) for name in os.listdir("/proc/self/task")} - before
        found["own"] = [nice(threading.get_native_id())]
        found["started"] = [nice(one) for one in started]

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    mine = nice(threading.get_native_id())
    assert found["own"][0] > mine
    assert len(found["started"]) >= 2  # itself and the other one of its team
    assert set(found["started"]) == set(found["own"])
    assert nice(threading.get_native_id()) == mine
