"""How many workers are wanted: so many that the rows in flight and in the queues fill a share of all slots.

Requests are a poor measure of a worker's work: one asks for one picture, another for 64. Rows in slots and rows that
wait are what a step costs and what a queue holds. At a share of 0.75 a quarter of the slots is free, so that a new
request starts at the next step while a further worker is being started (on a laptop 10 s, with a large model a minute).

Ray Serve calls the policy with the workers' latest `record_autoscaling_stats` and applies delays and bounds itself. It
pickles this module by value into its controller: nothing is imported here, ray included.
"""

from typing import Any, Protocol

ROWS, SLOTS = "rows", "slots"


class Context(Protocol):
    """What is read of `ray.serve.config.AutoscalingContext`."""

    current_num_replicas: int
    target_num_replicas: int
    running_replicas: list[Any]

    @property
    def aggregated_metrics(self) -> dict[str, dict[Any, float]] | None: ...


class SlotsPolicy:
    """Policy for `ray.serve.config.AutoscalingPolicy`.

    Args:
        target_share: of all slots that should be in use, queued rows counted as well.
    """

    def __init__(self, target_share: float) -> None:
        self._target_share = target_share

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """Workers wanted, not rounded and not bounded, and no state.

        Workers that have not reported (they are being started) count neither as rows nor as slots. While none has,
        the number stays as it is.
        """
        metrics = context.aggregated_metrics or {}
        running = set(context.running_replicas)
        rows = [value for replica, value in metrics.get(ROWS, {}).items() if replica in running]
        slots = [value for replica, value in metrics.get(SLOTS, {}).items() if replica in running and value > 0]
        if not slots:
            return context.target_num_replicas, {}
        slots_each = sum(slots) / len(slots)
        return sum(rows) / (self._target_share * slots_each), {}
