import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.api.application import build_api
from serve.metrics import PHASES, ApiMetrics, WorkerMetrics, merge_expositions
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, serving


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def worker(slots: int) -> WorkerMetrics:
    metrics = WorkerMetrics(num_slots=slots)
    metrics.set_occupancy(slots_in_use=slots - 1, queued_sequences=5, queued_requests=2)
    metrics.observe_step(seconds=0.01)
    metrics.count_tokens(slots - 1)
    metrics.observe_finished(images=4, timings_s=dict.fromkeys(PHASES, 0.1) | {"something else": 1.0})
    metrics.count_rejected("queue_full")
    metrics.count_cancelled()
    return metrics


def test_a_worker_exports_its_metrics() -> None:
    values = samples(worker(8).text())
    expected = {
        "kodalle_slots": 8, "kodalle_slots_in_use": 7, "kodalle_queued_sequences": 5, "kodalle_queued_requests": 2,
        "kodalle_tokens_total": 7, "kodalle_steps_total": 1, "kodalle_images_generated_total": 4,
        "kodalle_worker_cancelled_total": 1, "kodalle_step_seconds_count": 1,
    }  # fmt: skip
    assert {name: values[name, ()] for name in expected} == expected
    assert values["kodalle_worker_rejected_total", (("reason", "queue_full"),)] == 1
    phases = {labels[0][1] for name, labels in values if name == "kodalle_worker_phase_seconds_count"}
    assert phases == set(PHASES)


def test_two_workers_in_a_process_do_not_share_metrics() -> None:
    one, other = WorkerMetrics(num_slots=1), WorkerMetrics(num_slots=1)
    one.count_cancelled()
    assert samples(other.text())["kodalle_worker_cancelled_total", ()] == 0


def test_merged_texts_have_each_family_once_and_each_sample_with_its_replica() -> None:
    api_server = ApiMetrics()
    api_server.requests.labels("/v1/models", "200").inc(3)
    texts = {"a": worker(4).text(), 'b"\\\n': worker(9).text(), "api-server": api_server.text()}
    merged = merge_expositions(texts)
    families = [line for line in merged.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    values = samples(merged)
    for replica, text in texts.items():
        for (name, labels), value in samples(text).items():
            if not name.endswith("_created"):
                assert values[name, tuple(sorted((*labels, ("replica", replica))))] == value
    assert len(values) == sum(not name.endswith("_created") for text in texts.values() for name, _ in samples(text))


def test_merging_again_keeps_the_replica_labels() -> None:
    once = merge_expositions({"a": worker(4).text()})
    assert samples(merge_expositions({"other": once})) == samples(once)


def test_a_family_of_two_types_or_malformed_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="counter"):
        merge_expositions({"a": "# TYPE x gauge\nx 1\n", "b": "# TYPE x counter\nx_total 1\n"})
    with pytest.raises(ValueError):  # noqa: PT011  (the parser's own message)
        merge_expositions({"a": "x{ 1"})


def test_the_route_returns_the_api_servers_and_the_workers_metrics() -> None:
    with serving(build_api(ScriptedPool(), ServeSettings(page=False), replica="api-server-1")) as port:
        ask(port, "GET", "/healthz")
        reply = ask(port, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = samples(reply.body.decode())
    assert values["kodalle_slots", (("replica", "worker-1"),)] == 4
    labels = (("replica", "api-server-1"), ("route", "/healthz"), ("status", "200"))
    assert values["kodalle_requests_total", labels] == 1
