"""Prometheus metrics of API servers and workers, and the merging of several processes' expositions into one.

Each object has a registry of its own, never the library's global one, because several workers and API servers live in one
process in tests and on small machines. A `replica` label, added by `merge_expositions`, distinguishes the processes.
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PHASES = ("queue", "prefill", "decode", "vqgan", "ranking", "encoding", "total")
# From a cached 48-pixel image on a GPU (10 ms) to a full queue on two cores (two minutes).
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PHASE_SECONDS = (0.001, 0.0025, 0.005, *_SECONDS)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class ApiMetrics:
    """Metrics of one API server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("kodalle_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "kodalle_request_seconds",
            "Seconds from a request's arrival to its last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "kodalle_request_phase_seconds",
            "Seconds of answered generations, by phase.",
            ["phase"],
            buckets=_PHASE_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("kodalle_images", "Images returned.", registry=self.registry)
        self.embeddings = Counter(
            "kodalle_embeddings", "Captions and pictures embedded for answers.", registry=self.registry
        )
        self.rejected = Counter(
            "kodalle_rejected", "Requests answered with an error, by its code.", ["reason"], registry=self.registry
        )
        self.cancelled = Counter("kodalle_cancelled", "Requests whose client disconnected.", registry=self.registry)
        self.in_flight = Gauge("kodalle_requests_in_flight", "Requests being answered.", registry=self.registry)

    def count_generation(self, num_images: int, timings_s: Mapping[str, float]) -> None:
        """Counts an answered generation."""
        self.images.inc(num_images)
        _observe_phases(self.phase_seconds, timings_s)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class WorkerMetrics:
    """Metrics of one worker; called from its threads."""

    def __init__(self, *, num_slots: int) -> None:
        self.registry = registry = CollectorRegistry()
        slots = Gauge("kodalle_slots", "Sequences that fit into a step.", registry=registry)
        slots.set(num_slots)
        self._slots_in_use = Gauge("kodalle_slots_in_use", "Slots taken by sequences in flight.", registry=registry)
        self._queued_sequences = Gauge("kodalle_queued_sequences", "Sequences that wait for a slot.", registry=registry)
        self._queued_requests = Gauge(
            "kodalle_queued_requests", "Requests with no sequence in a slot yet.", registry=registry
        )
        self._tokens = Counter(
            "kodalle_tokens",
            "Image tokens sampled, counted when a sequence is finished or cancelled.",
            registry=registry,
        )
        self._steps = Counter("kodalle_steps", "Steps of the decoder.", registry=registry)
        self._step_seconds = Histogram(
            "kodalle_step_seconds", "Seconds per step.", buckets=_STEP_SECONDS, registry=registry
        )
        self._images = Counter("kodalle_images_generated", "Images generated, all candidates.", registry=registry)
        self._cancelled = Counter("kodalle_worker_cancelled", "Jobs cancelled by their client.", registry=registry)
        self._rejected = Counter("kodalle_worker_rejected", "Jobs refused, by reason.", ["reason"], registry=registry)
        self._phase_seconds = Histogram(
            "kodalle_worker_phase_seconds",
            "Seconds of finished jobs, by phase.",
            ["phase"],
            buckets=_PHASE_SECONDS,
            registry=registry,
        )

    def set_occupancy(self, *, slots_in_use: int, queued_sequences: int, queued_requests: int) -> None:
        self._slots_in_use.set(slots_in_use)
        self._queued_sequences.set(queued_sequences)
        self._queued_requests.set(queued_requests)

    def observe_step(self, *, seconds: float) -> None:
        """Counts a step of all sequences in flight."""
        self._steps.inc()
        self._step_seconds.observe(seconds)

    def count_tokens(self, tokens: int) -> None:
        """Counts a sequence's tokens when it ends: a step may sample several tokens of a sequence."""
        self._tokens.inc(tokens)

    def observe_finished(self, *, images: int, timings_s: Mapping[str, float]) -> None:
        self._images.inc(images)
        _observe_phases(self._phase_seconds, timings_s)

    def count_cancelled(self) -> None:
        self._cancelled.inc()

    def count_rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def _observe_phases(histogram: Histogram, timings_s: Mapping[str, float]) -> None:
    for phase in PHASES:  # and no others, which bounds the number of labels
        if phase in timings_s:
            histogram.labels(phase).observe(timings_s[phase])


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def merge_expositions(texts: Mapping[str, str]) -> str:
    """The Prometheus texts of several processes as one: each family once, each sample with the label `replica`.

    A sample that has the label keeps it, so merged texts can be merged again. Creation times of counters are left out.

    Args:
        texts: the text of each process by its replica's name.

    Raises:
        ValueError: a text that is not Prometheus text, or a family that has different types in two processes.
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
