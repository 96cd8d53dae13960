"""Unit tests start no Ray."""

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """ray.init raises."""
    ray = pytest.importorskip("ray")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a unit test must not start or join a Ray cluster")

    monkeypatch.setattr(ray, "init", refuse)
