"""Figures for Prometheus: what an edge counts, what a worker counts, and how the texts of many become one.

Each process has a registry of its own, never the library's global one: several workers and edges live in one process in
tests and on small machines. Replicas are told apart by a `replica` label, which `merge_expositions` adds.
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PHASES = ("queue", "prefill", "decode", "vqgan", "ranking", "encoding", "total")
# From a cached 48-pixel picture on a GPU (10 ms) to a full queue on two cores (two minutes).
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PHASE_SECONDS = (0.001, 0.0025, 0.005, *_SECONDS)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ApiMetrics:
    """What one HTTP edge counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("kodalle_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "kodalle_request_seconds",
            "From a request's arrival to its last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "kodalle_request_phase_seconds",
            "Seconds of answered drawings, by phase.",
            ["phase"],
            buckets=_PHASE_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("kodalle_images", "Pictures returned.", registry=self.registry)
        self.rejected = Counter(
            "kodalle_rejected", "Requests answered with an error, by its code.", ["reason"], registry=self.registry
        )
        self.cancelled = Counter("kodalle_cancelled", "Requests whose client hung up.", registry=self.registry)
        self.in_flight = Gauge("kodalle_requests_in_flight", "Requests being answered.", registry=self.registry)

    def count_drawing(self, num_images: int, timings_s: Mapping[str, float]) -> None:
        """An answered drawing."""
        self.images.inc(num_images)
        _observe_phases(self.phase_seconds, timings_s)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class WorkerMetrics:
    """What one worker counts; called from its threads."""

    def __init__(self, *, num_slots: int) -> None:
        self.registry = registry = CollectorRegistry()
        slots = Gauge("kodalle_slots", "Rows that fit into a step.", registry=registry)
        slots.set(num_slots)
        self._slots_in_use = Gauge("kodalle_slots_in_use", "Rows being drawn.", registry=registry)
        self._queued_sequences = Gauge("kodalle_queued_sequences", "Rows that wait for a slot.", registry=registry)
        self._queued_requests = Gauge(
            "kodalle_queued_requests", "Requests with no row in a slot yet.", registry=registry
        )
        self._tokens = Counter(
            "kodalle_tokens", "Image tokens drawn, counted when their picture is whole or given up.", registry=registry
        )
        self._steps = Counter("kodalle_steps", "Steps of the decoder.", registry=registry)
        self._step_seconds = Histogram(
            "kodalle_step_seconds", "Seconds of a step.", buckets=_STEP_SECONDS, registry=registry
        )
        self._drawn = Counter("kodalle_images_generated", "Pictures drawn, all candidates.", registry=registry)
        self._cancelled = Counter("kodalle_worker_cancelled", "Drawings given up by their client.", registry=registry)
        self._rejected = Counter("kodalle_worker_rejected", "Jobs refused, by reason.", ["reason"], registry=registry)
        self._phase_seconds = Histogram(
            "kodalle_worker_phase_seconds",
            "Seconds of finished drawings, by phase.",
            ["phase"],
            buckets=_PHASE_SECONDS,
            registry=registry,
        )

    def occupied(self, *, slots_in_use: int, queued_sequences: int, queued_requests: int) -> None:
        self._slots_in_use.set(slots_in_use)
        self._queued_sequences.set(queued_sequences)
        self._queued_requests.set(queued_requests)

    def stepped(self, *, seconds: float) -> None:
        """A step of all rows in flight."""
        self._steps.inc()
        self._step_seconds.observe(seconds)

    def drew(self, *, tokens: int) -> None:
        """A row that ended: a step may draw several tokens of a row, so they are not counted by steps."""
        self._tokens.inc(tokens)

    def finished(self, *, images: int, timings_s: Mapping[str, float]) -> None:
        self._drawn.inc(images)
        _observe_phases(self._phase_seconds, timings_s)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def _observe_phases(histogram: Histogram, timings_s: Mapping[str, float]) -> None:
    for phase in PHASES:  # and no other: labels stay few
        if phase in timings_s:
            histogram.labels(phase).observe(timings_s[phase])


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def merge_expositions(texts: Mapping[str, str]) -> str:
    """The texts of several processes as one: each family once, each sample with the label `replica`.

    A sample that has that label keeps it, so that merged texts can be merged again. The times at which counters were
    created are left out.

    Args:
        texts: the text of each process by its replica's name.

    Raises:
        ValueError: a text is no Prometheus text, or a family is of another type in another process.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            if merged.type != family.type:
                raise ValueError(f"{family.name} is a {merged.type} and a {family.type}")
            for sample in family.samples:
                labels = {"replica": replica} | sample.labels
                merged.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
    registry = CollectorRegistry()
    registry.register(_Merged(families.values()))
    return generate_latest(registry).decode()
