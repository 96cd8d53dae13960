"""Gradients are whole when as much was added as in the step before, and are handed over then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import pytest
import torch

from nesa_ray.errors import StageFailed
from nesa_ray.runtime.gradients import GradientCounts, StepGradients
from nesa_ray.runtime.precision import working_copies
from nesa_ray.runtime.weight_gradient import WeightGradients

MICRO_BATCHES = 3


def leaves() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"table": (7, 4), "first": (5, 4), "bias": (5,), "last": (2, 5), "unused": (3,)}
    return {n: torch.randn(s, generator=generator, requires_grad=True) for n, s in shapes.items()}


def loss(w: dict[str, torch.Tensor], store: WeightGradients, seed: int) -> torch.Tensor:
    ids = torch.randint(0, 7, (6,), generator=torch.Generator().manual_seed(seed))
    x = store.embedding(w["table"], ids)
    x = store.linear(x, w["first"], w["bias"]).tanh() + w["bias"]  # the bias is used twice
    return store.linear(x, w["last"]).square().mean()


ORDER = ("unused", "last", "first", "bias", "table")


def run(
    w: dict[str, torch.Tensor], counts: GradientCounts, taken: Callable[[StepGradients, int], None]
) -> StepGradients:
    """A step; `taken` is called after each micro-batch."""
    store = WeightGradients()
    gradients = StepGradients(w, ORDER, counts)
    for m in range(MICRO_BATCHES):
        loss(w, store, m).backward()
        taken(gradients, m)
    gradients.finish()
    return gradients


def test_gradients_are_handed_over_while_the_step_runs() -> None:
    reference = leaves()
    for m in range(MICRO_BATCHES):
        loss(reference, WeightGradients(), m).backward()
    counts = GradientCounts()
    run(leaves(), counts, lambda *_: None).close()
    w = leaves()
    whole: list[list[str]] = []

    def look(gradients: StepGradients, micro_batch: int) -> None:
        whole.append([n for n in ORDER if gradients._is_whole(n)])

    gradients = run(w, counts, look)
    assert whole == [["unused"]] * (MICRO_BATCHES - 1) + [list(ORDER)]
    for n in ORDER:
        expected = reference[n].grad
        assert torch.equal(gradients.take(n), torch.zeros(3) if expected is None else expected)
        assert w[n].grad is None


def test_a_deferred_weight_gradient_is_waited_for() -> None:
    counts = GradientCounts()
    run(leaves(), counts, lambda *_: None).close()
    w, store = leaves(), WeightGradients()
    gradients = StepGradients(w, ORDER, counts)
    store.deferring = True
    for m in range(MICRO_BATCHES):
        loss(w, store, m).backward()
    assert not gradients._is_whole("last")
    for add in store.take():
        add()
    assert all(gradients._is_whole(n) for n in ORDER)


def test_the_sums_of_working_copies_are_watched() -> None:
    counts = GradientCounts()
    for _ in range(2):
        w = leaves()
        gradients = StepGradients(w, ORDER, counts)
        for m in range(MICRO_BATCHES):
            loss(working_copies(w, torch.bfloat16), WeightGradients(), m).backward()
        early = [n for n in ORDER if gradients._is_whole(n)]
        gradients.finish()
        gradients.close()
    assert early == list(ORDER)


def test_another_thread_waits_and_a_failure_reaches_it() -> None:
    w = leaves()
    gradients = StepGradients(w, ORDER, GradientCounts(), late={"table"})
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[torch.Tensor] = pool.submit(gradients.take, "table")
        with pytest.raises(NotYet):
            waiting.result(0.05)
        gradients.fail(StageFailed("stage 1: 1B0: broken"))
        with pytest.raises(StageFailed, match="broken"):
            waiting.result(5)
    assert threading.active_count() < 50


def test_late_ones_wait_for_the_end() -> None:
    counts = GradientCounts()
    run(leaves(), counts, lambda *_: None).close()
    w = leaves()
    gradients = StepGradients(w, ORDER, counts, late={"table"})
    for m in range(MICRO_BATCHES):
        loss(w, WeightGradients(), m).backward()
    assert not gradients._is_whole("table")
    gradients.finish()
    assert gradients._is_whole("table")


def test_more_than_was_counted_is_an_error() -> None:
    counts = GradientCounts()
    run(leaves(), counts, lambda *_: None).close()
    w = leaves()
    gradients = run(w, counts, lambda *_: None)
    gradients.take("last")
    with pytest.raises(StageFailed, match="last: more was added"):
        loss(w, WeightGradients(), 0).backward()
