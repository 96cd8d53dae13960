"""The garbage collector stands still inside, and afterwards is as it was."""

import gc
import weakref

import pytest

from nesa_ray.garbage import kept, uncollected


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def left_behind() -> "weakref.ref[Ring]":
    return weakref.ref(Ring())


def test_nothing_is_collected_inside() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()  # the inner one doesn't end the outer one
        ring = left_behind()
        _ = [[] for _ in range(100_000)]
        assert ring() is not None
    assert gc.isenabled()
    gc.collect()
    assert ring() is None


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), uncollected():
        raise ValueError("inside")
    assert gc.isenabled()


def test_what_is_kept_isnt_looked_at_again() -> None:
    before = gc.get_freeze_count()
    try:
        with kept():
            ring = left_behind()
        assert gc.get_freeze_count() > before
        gc.collect()
        assert ring() is not None
    finally:
        gc.unfreeze()
    gc.collect()
    assert ring() is None
