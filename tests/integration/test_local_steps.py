"""Replicas that agree now and then, and gradients averaged in int8: in processes over gloo."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nesa_ray.runtime.averaging import Mean
from nesa_ray.runtime.codec import CODECS
from nesa_ray.runtime.gradients import StepGradients
from nesa_ray.runtime.local_steps import LocalStepsOptimizer
from nesa_ray.runtime.zero import LocalConfig, OptimizerConfig, ReplicatedOptimizer, StageOptimizer

REPLICAS = 3
ADAMW = OptimizerConfig(lr=1e-2, weight_decay=0.0)
EXACT = LocalConfig(steps=4, fragments=2, delay=1, codec="raw")
SHAPES = {"a": (40, 30), "bias": (30,), "b": (30, 50), "c": (50,)}


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def gradient(name: str, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def step(optimizer: StageOptimizer, at: int, rank: int) -> None:
    with optimizer.weights() as leaves:
        for n, leaf in leaves.items():
            leaf.grad = gradient(n, at, rank)
        optimizer.reduce(StepGradients.whole(leaves))
        optimizer.update(1e-2)


def reference(steps: int, local: LocalConfig) -> list[dict[str, torch.Tensor]]:
    """What LocalStepsOptimizer should come to, replica by replica, all in one place: the algorithm written out."""
    replicas = [parameters() for _ in range(REPLICAS)]
    inner = [torch.optim.AdamW(p.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0) for p in replicas]
    agreed = {n: p.detach().clone() for n, p in parameters().items()}
    momentum = {n: torch.zeros_like(p) for n, p in agreed.items()}
    fragments = [["a", "bias"], ["b", "c"]]
    flights: dict[int, tuple[int, list[dict[str, torch.Tensor]]]] = {}
    for at in range(steps):
        for rank, (mine, adamw) in enumerate(zip(replicas, inner, strict=True)):
            for n, p in mine.items():
                p.grad = gradient(n, at, rank)
            adamw.step()
        done = at + 1
        for f, names in enumerate(fragments):
            if f in flights and flights[f][0] == done:
                for mine, before in zip(replicas, flights.pop(f)[1], strict=True):
                    for n in names:
                        mine[n].data += agreed[n] - before[n]
            if done % local.steps == (f + 1) * local.steps // len(fragments) % local.steps:
                flights[f] = done + local.delay, [{n: m[n].detach().clone() for n in names} for m in replicas]
                for n in names:
                    mean = sum(agreed[n] - m[n].detach() for m in replicas) / REPLICAS
                    momentum[n] = local.momentum * momentum[n] + mean
                    agreed[n] = agreed[n] - local.lr * (mean + local.momentum * momentum[n])
    return [{n: p.detach() for n, p in mine.items()} for mine in replicas]


def follows_the_algorithm(rank: int) -> None:
    mine = parameters()
    optimizer = LocalStepsOptimizer(mine, ADAMW, EXACT)
    for at in range(13):
        step(optimizer, at, rank)
    expected = reference(13, EXACT)
    for n, p in mine.items():
        torch.testing.assert_close(p.detach(), expected[rank][n], rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected[0]["a"], expected[1]["a"])
    optimizer.settle()
    for p in mine.values():
        everyone = [torch.empty_like(p) for _ in range(REPLICAS)]
        dist.all_gather(everyone, p.detach())
        assert all(torch.equal(p, other) for other in everyone)


def resumes_as_if_never_stopped(rank: int) -> None:
    local = LocalConfig(steps=4, fragments=2, delay=2)
    whole = parameters()
    optimizer = LocalStepsOptimizer(whole, ADAMW, local)
    for at in range(7):
        step(optimizer, at, rank)
    optimizer.settle(moments=True)  # as a checkpoint does
    saved = {n: p.detach().clone() for n, p in whole.items()}
    moments = {m: {n: t.clone() for n, t in of.items()} for m, of in optimizer.moments().items()}
    for at in range(7, 15):
        step(optimizer, at, rank)
    again = parameters()
    with torch.no_grad():
        for n, p in again.items():
            p.copy_(saved[n])
    resumed = LocalStepsOptimizer(again, ADAMW, local)
    resumed.load(moments, 7)
    for at in range(7, 15):
        step(resumed, at, rank)
    assert all(torch.equal(p, again[n]) for n, p in whole.items())


def int8_means(rank: int) -> None:
    """Each within the codec's bound of the true mean; with feedback, so is the sum of many."""
    mean, n = Mean("int8"), 5000
    sent, meant = torch.zeros(n), torch.zeros(n)
    for at in range(20):
        mine = [torch.randn(n, generator=torch.Generator().manual_seed(100 * at + r)) for r in range(REPLICAS)]
        got = mean("x", mine[rank].clone())
        true = sum(mine) / REPLICAS
        sent, meant = sent + got, meant + true
        bound = sum(CODECS["int8"].bound(x) for x in mine) / REPLICAS
        if not at:
            assert bool(((got - true).abs() <= bound + 1e-6).all())
        assert float((sent - meant).abs().max()) <= 1.5 * float(bound.max())
    assert mean.sent_bytes < 20 * (REPLICAS - 1) * 1.01 * n
    small = mean("two", torch.tensor([1.0 + rank, -1.0]))
    torch.testing.assert_close(small, torch.tensor([2.0, -1.0]))


def reduces_in_int8(rank: int) -> None:
    """A step with int8 gradients is near the exact one, and the same on every replica."""
    exact, coarse = parameters(), parameters()
    for mine, codec in ((exact, "raw"), (coarse, "int8")):
        optimizer = ReplicatedOptimizer(mine, ADAMW, REPLICAS, codec)
        for at in range(5):
            step(optimizer, at, rank)
    start = parameters()
    for n, p in coarse.items():
        moved, expected = p.detach() - start[n].detach(), exact[n].detach() - start[n].detach()
        assert float((moved - expected).norm()) < 0.1 * float(expected.norm())
        everyone = [torch.empty_like(p) for _ in range(REPLICAS)]
        dist.all_gather(everyone, p.detach())
        assert all(torch.equal(p, other) for other in everyone)


def every_check(rank: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=REPLICAS)
    for check in (follows_the_algorithm, resumes_as_if_never_stopped, int8_means, reduces_in_int8):
        check(rank)
    dist.destroy_process_group()


def test_replicas(tmp_path: Path) -> None:
    mp.spawn(every_check, args=(tmp_path / "meeting",), nprocs=REPLICAS)
