"""How much a key may draw a minute: a token bucket a key, each kept as one number.

A bucket holds a minute's worth and fills at an even rate. What is kept is the moment at which it will be full again,
from which all follows (the "virtual scheduling" form of the generic cell rate algorithm, ITU-T I.371); a full bucket
is not kept at all, so keys that rest cost nothing. In any time t a key gets at most a minute's worth plus rate * t,
and what its last request costs above a minute's worth.

One process holds the limiter for all edges; it has no clock of its own.
"""

import math

_SWEEP_AT = 1024  # keys; dictionaries this small are left alone
_SLACK = 1e-9  # of a minute's worth: whoever waits as long as told is not refused for the rounding of a difference


class RateLimiter:
    """The buckets of all keys. Called from one thread."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        """Buckets that are kept."""
        return len(self._full_at)

    def take(self, key_id: str, per_minute: float, cost: float, now: float) -> float:
        """Takes `cost` from a key's bucket, or nothing.

        A request that costs more than a minute's worth is let through by a full bucket, which then takes longer to
        fill: a small limit slows large requests, it does not forbid them.

        Args:
            per_minute: the key's limit; it may change from call to call.
            now: seconds, of a clock that never goes back.

        Returns:
            0.0 when it was taken, else the seconds after which it can be if the key asks for nothing else.

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
        """Forgets full buckets; next time when there are twice as many, so that a call costs O(1) on average."""
        self._full_at = {key_id: full_at for key_id, full_at in self._full_at.items() if full_at > now}
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._full_at))
