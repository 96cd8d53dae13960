"""Arms of a benchmark: processes that stand by and run some steps when told to, in turn with the other arms.

Every arm's processes are alive from the beginning and blocked while another arm runs, so all see the same machine.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from nesa_ray.cluster.local import free_ports


class Arm(Protocol):
    """One contender."""

    def run(self, steps: int) -> dict[str, Any]:
        """Runs steps and returns at least `seconds`."""

    def close(self) -> None:
        """Ends its processes."""


class ProcessArm:
    """Ranks as processes, rank r pinned to cores[r]; `setup(rank, port)` returns a function of what `ask` is given."""

    def __init__(self, setup: Callable[[int, int], Callable[[Any], Any]], cores: Sequence[Sequence[int]]) -> None:
        context = mp.get_context("spawn")
        (port,) = free_ports(1)
        self._pipes, self._processes = [], []
        for rank, mine in enumerate(cores):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(setup, rank, port, tuple(mine), there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            _answer(pipe)

    def ask(self, work: Any) -> list[Any]:
        """What each rank's function returns for it."""
        for pipe in self._pipes:
            pipe.send(work)
        return [_answer(p) for p in self._pipes]

    def run(self, steps: int) -> dict[str, Any]:
        """See Arm."""
        began = time.perf_counter()
        answers = self.ask(steps)
        return {"seconds": time.perf_counter() - began, "loss": next((a for a in answers if a is not None), None)}

    def close(self) -> None:
        """See Arm."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it failed, and has been heard of
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.terminate()


def _answer(pipe: Any) -> Any:
    ok, value = pipe.recv()
    if not ok:
        raise RuntimeError(value)
    return value


def _rank(
    setup: Callable[[int, int], Callable[[Any], Any]], rank: int, port: int, cores: tuple[int, ...], pipe: Any
) -> None:
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    import torch

    torch.set_num_threads(len(cores))
    try:
        run = setup(rank, port)
        pipe.send((True, None))
        while (work := pipe.recv()) is not None:
            pipe.send((True, run(work)))
    except EOFError:
        return
    except Exception as e:
        import traceback

        pipe.send((False, f"rank {rank}: {e}\n{traceback.format_exc()}"))


def interleave(arms: Mapping[str, Arm], rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Each round runs every arm once, in an order that turns; a first round warms up and isn't counted."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    names = list(arms)
    for r in range(rounds + 1):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            print(f"round {r}/{rounds}: {name}   ", end="\r", file=sys.stderr, flush=True)
            measured = arms[name].run(steps)
            if r:
                results[name].append(measured)
    print(" " * 60, end="\r", file=sys.stderr)
    return results


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b, pair by pair: what drifts in the machine cancels."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def conclude(name: str, ratios: Mapping[str, float], goals: Mapping[str, float], at_most: Sequence[str] = ()) -> None:
    """Prints the last line: ratios, the goals they are held to (at least, or at most), and whether they are met."""
    met = {k: (ratios[k] <= g if k in at_most else ratios[k] >= g) for k, g in goals.items() if k in ratios}
    print(json.dumps({"benchmark": name, "ratios": dict(ratios), "goals": dict(goals), "met": met}), flush=True)
