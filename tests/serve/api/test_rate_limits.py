import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.rate_limits import RateLimiter

_CALLS = st.lists(st.tuples(st.floats(0, 40), st.integers(1, 64)), min_size=1, max_size=60)


class Bucket:
    """Reference token bucket: tokens that refill at a constant rate up to a minute's allowance."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute, self.tokens, self.filled_at = per_minute, per_minute, 0.0

    def take(self, cost: float, now: float) -> float:
        self.tokens = min(self.per_minute, self.tokens + (now - self.filled_at) * self.per_minute / 60)
        self.filled_at = now
        missing = min(cost, self.per_minute) - self.tokens
        if missing > 1e-9 * self.per_minute:
            return missing * 60 / self.per_minute
        self.tokens -= cost
        return 0.0


@settings(max_examples=200, deadline=None)
@given(_CALLS, st.sampled_from([0.5, 1, 30, 120]))
def test_it_is_a_token_bucket(calls: list[tuple[float, int]], per_minute: float) -> None:
    limiter, bucket, now = RateLimiter(), Bucket(per_minute), 0.0
    for pause_s, cost in calls:
        now += pause_s
        assert limiter.take("key", per_minute, cost, now) == pytest.approx(bucket.take(cost, now), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(_CALLS, st.sampled_from([0.5, 1, 30, 120]))
def test_no_more_passes_than_a_minutes_allowance_and_the_rate(
    calls: list[tuple[float, int]], per_minute: float
) -> None:
    limiter, now, taken = RateLimiter(), 0.0, 0.0
    for pause_s, cost in calls:
        now += pause_s
        before = taken
        if limiter.take("key", per_minute, cost, now) == 0.0:
            taken += cost
            assert before + min(cost, per_minute) <= per_minute * (1 + now / 60) + 1e-6


@settings(max_examples=200, deadline=None)
@given(_CALLS, st.sampled_from([0.7, 33, 120]))
def test_a_retry_succeeds_after_the_reported_wait_and_not_a_little_sooner(
    calls: list[tuple[float, int]], per_minute: float
) -> None:
    limiter, now = RateLimiter(), 0.0
    for _, cost in calls:
        wait_s = limiter.take("key", per_minute, cost, now)
        if wait_s > 0:
            assert limiter.take("key", per_minute, cost, now + 0.999 * wait_s) > 0
            now += wait_s
            assert limiter.take("key", per_minute, cost, now) == 0.0


def test_a_request_larger_than_a_minutes_allowance_passes_a_full_bucket_and_is_paid_off_later() -> None:
    limiter = RateLimiter()
    assert limiter.take("key", 16, 64, 0.0) == 0.0
    assert limiter.take("key", 16, 1, 0.0) == pytest.approx(60 * (64 - 16 + 1) / 16)
    assert limiter.take("key", 16, 64, 0.0) == pytest.approx(60 * 64 / 16)


def test_keys_have_separate_buckets() -> None:
    limiter = RateLimiter()
    assert limiter.take("a", 1, 1, 0.0) == 0.0
    assert limiter.take("a", 1, 1, 0.0) == pytest.approx(60.0)
    assert limiter.take("b", 1, 1, 0.0) == 0.0


def test_idle_keys_are_dropped_and_those_in_debt_are_not() -> None:
    limiter = RateLimiter()
    limiter.take("in debt", 1, 1_000_000, 0.0)
    for index in range(20_000):
        assert limiter.take(f"key {index}", 60, 1, index * 0.01) == 0.0  # full again after a second: about 100 are not
    assert len(limiter) <= 1024
    assert limiter.take("in debt", 1, 1, 200.0) > 0


@pytest.mark.parametrize(
    ("per_minute", "cost"), [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1, -1), (1, math.nan), (1, math.inf)]
)
def test_an_invalid_limit_or_cost_is_an_error(per_minute: float, cost: float) -> None:
    with pytest.raises(ValueError, match="per_minute"):
        RateLimiter().take("key", per_minute, cost, 0.0)
