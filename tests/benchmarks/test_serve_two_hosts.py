"""Two hosts as network namespaces: their link, and a server over both that survives the loss of one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
LISTEN = "import http.server as h; h.ThreadingHTTPServer(('0.0.0.0', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
REQUEST = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)"


@pytest.fixture(autouse=True)
def _requires_namespaces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from serving.hosts import missing_requirement

        if reason := missing_requirement():
            pytest.skip(reason)
        yield


def test_hosts_reach_only_each_other_until_the_link_is_cut(tmp_path: Path) -> None:
    from serving.hosts import two_hosts

    with two_hosts() as (first, second):
        process = first.start([sys.executable, "-c", LISTEN], log=tmp_path / "log", env=dict(os.environ))
        request = [sys.executable, "-c", REQUEST, f"http://{first.address}:8000/"]
        _until_it_listens(lambda: second.run(request, env=dict(os.environ), timeout_s=20))
        first.cut()
        with pytest.raises(RuntimeError, match=r"timed out|unreachable|No route"):
            second.run(request, env=dict(os.environ), timeout_s=20)
        first.run(request, env=dict(os.environ), timeout_s=20)  # it still reaches itself
        first.mend()
        _until_it_listens(lambda: second.run(request, env=dict(os.environ), timeout_s=20))
        assert subprocess.run(request, capture_output=True, check=False).returncode, "this machine cannot reach them"
        assert process.poll() is None
    assert process.poll() is not None
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.name not in left
    assert second.name not in left


def _until_it_listens(send: Callable[[], str]) -> None:
    """On a busy machine the link is up late, too: there is no route before."""
    for _ in range(50):
        try:
            send()
        except RuntimeError as error:
            if not re.search("refused|No route|timed out", str(error)):
                raise
        else:
            return
    pytest.fail("no listener")


@pytest.mark.soak
def test_a_server_over_two_hosts_survives_the_loss_of_one() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "serve_two_hosts.py"), "--cut-s", "25"],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    phases = json.loads(done.stdout.splitlines()[-1])["phases"]
    assert len(phases["both"]["images_by_worker"]) == 2
    assert min(phases["both"]["images_by_worker"]) > 0, "both hosts' workers generated images"
    assert phases["cut"]["in_flight_at_the_cut"] > 0
    assert phases["cut"]["lost"] == {}
    assert phases["cut"]["wrong_pixels"] == phases["cut"]["requests_with_two_files"] == 0
    assert phases["cut"]["longest_wait_s"] - phases["cut"]["usual_longest_wait_s"] < 20
    assert phases["healed"]["worker"]["answered"] > 0
