"""Rate limits of API keys: one token bucket per key, stored as one number.

A bucket holds a minute's allowance and refills at a constant rate. Only the time at which it will be full again is stored,
from which its level follows (the "virtual scheduling" form of the generic cell rate algorithm, ITU-T I.371). Full buckets
are not stored, so idle keys cost nothing. In any time t a key gets at most a minute's allowance plus rate * t, plus
whatever its last request costs above a minute's allowance.

One process holds the limiter for all API servers; the limiter has no clock of its own.
"""

import math

_SWEEP_AT = 1024  # keys; smaller dictionaries are not swept
_SLACK = 1e-9  # of a minute's allowance: a client that waits the reported time is not refused because of rounding


class RateLimiter:
    """The buckets of all keys. Called from one thread."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        """The number of stored buckets."""
        return len(self._full_at)

    def take(self, key_id: str, per_minute: float, cost: float, now: float) -> float:
        """Takes `cost` from a key's bucket, or nothing.

        A request that costs more than a minute's allowance is admitted by a full bucket, which then takes longer to
        refill: a small limit slows large requests and does not forbid them.

        Args:
            per_minute: the key's limit; it may change from call to call.
            now: monotonic seconds.

        Returns:
            0.0 when it was taken, else the seconds after which it can be, if the key requests nothing else.

        Raises:
            ValueError: a limit that is not above 0, a cost below 0, or either not finite.
        """
        if not (0 < per_minute < math.inf and 0 <= cost < math.inf):
            raise ValueError(f"per_minute {per_minute} must be above 0 and cost {cost} at least 0, both finite")
        per_second = per_minute / 60
        full_at = max(now, self._full_at.get(key_id, now))
        held = per_minute - (full_at - now) * per_second
        missing = min(cost, per_minute) - held
        if missing > _SLACK * per_minute:
            return missing / per_second
        self._full_at[key_id] = full_at + cost / per_second
        if len(self._full_at) >= self._sweep_at:
            self._sweep(now)
        return 0.0

    def _sweep(self, now: float) -> None:
        """Drops full buckets; runs again at twice the remaining number, so a call costs O(1) amortized."""
        self._full_at = {key_id: full_at for key_id, full_at in self._full_at.items() if full_at > now}
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._full_at))
