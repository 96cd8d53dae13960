"""What an endpoint is to its HTTP application and to Ray Serve, whatever it serves."""

from __future__ import annotations

from typing import Any, Protocol

from nesa_ray.serving.metrics import Metrics

READY, DRAINING, FAILED = "ready", "draining", "failed"


class Running(Protocol):
    """What answers an endpoint's requests: an Engine, a Predictor."""

    metrics: Metrics

    @property
    def state(self) -> str:
        """READY; DRAINING: ends what it has begun, and takes no more; FAILED: or closed."""

    def check_health(self) -> None:
        """Raises the failure that ended it, if one did."""

    def check_ready(self) -> None:
        """Raises RuntimeFailure when no more requests are taken."""

    def measure(self) -> dict[str, Any]:
        """Brings the gauges of `metrics` up to date; the same as plain data."""

    def close(self) -> None:
        """Ends all requests and stops the stages.  Idempotent."""
