"""Autoscaling policy: as many workers as keep the sequences in flight and in the queues at a target share of all slots.

Requests are a poor measure of a worker's load: one generates a single image, another 64. Sequences in slots and in the
queue are what a step costs and what a queue holds. At a target share of 0.75 a quarter of the slots is free, so a new
request starts at the next step while a further worker is started (10 s on a laptop, a minute with a large model).

Ray Serve calls the policy with the workers' latest `record_autoscaling_stats` and applies delays and bounds itself. It
pickles this module by value into its controller, so the module imports nothing of this project, and not ray.
"""

from typing import Any, Protocol

SEQUENCES, SLOTS = "sequences", "slots"


class Context(Protocol):
    """The part of `ray.serve.config.AutoscalingContext` that the policy reads."""

    current_num_replicas: int
    target_num_replicas: int
    running_replicas: list[Any]

    @property
    def aggregated_metrics(self) -> dict[str, dict[Any, float]] | None: ...


class SlotsPolicy:
    """Policy for `ray.serve.config.AutoscalingPolicy`.

    Args:
        target_share: share of all slots that should be in use, queued sequences included.
    """

    def __init__(self, target_share: float) -> None:
        self._target_share = target_share

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The wanted number of workers, neither rounded nor bounded, and an empty state.

        Workers that have not reported, because they are starting, add neither sequences nor slots. Until one has
        reported the number stays as it is.
        """
        metrics = context.aggregated_metrics or {}
        running = set(context.running_replicas)
        sequences = [value for replica, value in metrics.get(SEQUENCES, {}).items() if replica in running]
        slots = [value for replica, value in metrics.get(SLOTS, {}).items() if replica in running and value > 0]
        if not slots:
            return context.target_num_replicas, {}
        slots_per_worker = sum(slots) / len(slots)
        return sum(sequences) / (self._target_share * slots_per_worker), {}
