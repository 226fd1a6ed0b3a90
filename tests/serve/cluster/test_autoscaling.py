"""The autoscaling policy with Ray's own contexts and through Ray's own wrapper."""

from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve.app import autoscaling
from serve.arguments import read_arguments
from serve.cluster.autoscaling import SEQUENCES, SLOTS, SlotsPolicy

DEPLOYMENT = DeploymentID(name="Worker", app_name="kodalle")


def replicas(count: int) -> list[ReplicaID]:
    return [ReplicaID(unique_id=str(number), deployment_id=DEPLOYMENT) for number in range(count)]


def context(
    sequences: list[float],
    *,
    slots: float = 32,
    starting: int = 0,
    gone: int = 0,
    config: AutoscalingConfig | None = None,
) -> AutoscalingContext:
    """`sequences` of each worker that has reported; `gone` more have reported and died since."""
    known = replicas(len(sequences) + gone + starting)
    reported = known[: len(sequences) + gone]
    values = sequences + [1000.0] * gone
    running = known[: len(sequences)] + known[len(sequences) + gone :]
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Worker",
        app_name="kodalle",
        current_num_replicas=len(running),
        target_num_replicas=len(running),
        running_replicas=running,
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics={
            SEQUENCES: dict(zip(reported, values, strict=True)),
            SLOTS: dict.fromkeys(reported, slots),
        },
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=config,
    )


@pytest.mark.parametrize(
    ("sequences", "wanted"),
    [
        ([0.0], 0.0),  # Ray's bounds make it the smallest number allowed
        ([24.0], 1.0),  # three quarters of 32
        ([32.0], 4 / 3),
        ([32.0 + 64.0], 4.0),  # full, and 64 sequences wait
        ([24.0, 24.0], 2.0),
        ([24.0, 0.0], 1.0),
    ],
)
def test_sequences_in_slots_and_queues_fill_three_quarters_of_the_slots(sequences: list[float], wanted: float) -> None:
    assert SlotsPolicy(0.75)(context(sequences))[0] == pytest.approx(wanted)


def test_workers_that_start_or_are_gone_are_not_counted() -> None:
    assert SlotsPolicy(0.75)(context([24.0, 24.0], starting=2, gone=1))[0] == pytest.approx(2.0)


def test_without_reports_the_number_stays() -> None:
    assert SlotsPolicy(0.75)(context([], starting=3))[0] == 3


def test_ray_pickles_bounds_and_delays_the_policy() -> None:
    arguments = read_arguments({"num_workers": 1, "max_workers": 4, "scale_up_after_s": 0}, source="test")
    config = autoscaling(arguments)
    policy: Any = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context([96.0]))[0] == pytest.approx(4.0)
    wrapped = _apply_autoscaling_config(policy)
    assert wrapped(context([96.0], config=config))[0] == 4
    now, _ = wrapped(context([0.0, 0.0], config=config))
    assert now == 2, "a worker is only stopped after scale_down_after_s seconds of low load"
    patient = config.model_copy(update={"upscale_delay_s": 60.0})
    assert _apply_autoscaling_config(policy)(context([96.0], config=patient))[0] == 1
