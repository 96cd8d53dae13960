"""A stage's optimizer in two processes over gloo: what it holds, against the planner's formula; when it reduces."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nesa_ray.planning.costing import optimizer_factor
from nesa_ray.runtime.gradients import GradientCounts, StepGradients
from nesa_ray.runtime.zero import OptimizerConfig, make_optimizer

REPLICAS = 2


def held_bytes() -> int:
    """Bytes of all tensors that live in this process, each storage once."""
    gc.collect()
    found = {}
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, torch.nn.Parameter):
            storage = o.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def most_held(zero: int) -> float:
    """The most bytes held at the ends of the parts of a step, for each byte of parameters; the second step counts."""
    parameters = {f"w{i}": torch.nn.Parameter(torch.randn(500, 1000)) for i in range(8)}
    parameters["bias"] = torch.nn.Parameter(torch.randn(1000))
    whole = sum(p.nbytes for p in parameters.values())
    before = held_bytes() - whole
    optimizer = make_optimizer(parameters, OptimizerConfig(), zero_stage=zero, replicas=REPLICAS)
    for _ in range(2):
        marks = []
        with optimizer.weights() as leaves:
            for n in leaves:
                leaves[n].grad = torch.ones_like(leaves[n])
            marks.append(held_bytes())
            optimizer.reduce(StepGradients.whole(leaves))
            marks.append(held_bytes())
            optimizer.update(1e-3)
            marks.append(held_bytes())
        del leaves
    return (max(marks) - before) / whole


def leave() -> None:
    """Ends the process without the interpreter's end: gloo's threads, which DeepSpeed's references keep alive, may let
    go of their last tensors during it, and abort (pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    os._exit(0)


def replica(rank: int, zero: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=REPLICAS)
    held = most_held(zero)
    (out / str(rank)).write_text(str(held))
    leave()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_held_bytes_are_the_formulas(zero: int, tmp_path: Path) -> None:
    mp.spawn(replica, args=(zero, tmp_path), nprocs=REPLICAS)
    for rank in range(REPLICAS):
        held = float((tmp_path / str(rank)).read_text())
        assert held == pytest.approx(optimizer_factor(zero, REPLICAS), rel=0.05)


def reduced_before_the_end(rank: int, at: Path) -> None:
    """In each ZeRO stage's second step all gradients are reduced although the step hasn't ended."""
    dist.init_process_group("gloo", init_method=f"file://{at}/meeting", rank=rank, world_size=REPLICAS)
    for zero in range(4):
        torch.manual_seed(0)
        parameters = {f"w{i}": torch.nn.Parameter(torch.randn(40, 30)) for i in range(4)}
        expected = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        reference = torch.optim.AdamW(expected.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        optimizer = make_optimizer(parameters, OptimizerConfig(weight_decay=0.0), zero_stage=zero, replicas=REPLICAS)
        counts = GradientCounts()
        for step in range(3):
            with optimizer.weights() as leaves, ThreadPoolExecutor(1) as reducer:
                gradients = StepGradients(leaves, sorted(leaves, reverse=True), counts)
                reducing = reducer.submit(optimizer.reduce, gradients, norm=True)
                for leaf in leaves.values():
                    (leaf * (1.0 + rank)).square().sum().backward()
                if not step:
                    gradients.finish()
                squared = reducing.result(60)
                gradients.finish()
                optimizer.update(1e-2, scale=0.5)
                gradients.close()
            for w in expected.values():
                w.grad = 5.0 * w.detach()  # the mean of 2 w (1 + rank)²
            assert squared == pytest.approx(float(sum(w.grad.square().sum() for w in expected.values())), rel=1e-5)
            for w in expected.values():
                w.grad *= 0.5
            reference.step()
        with optimizer.weights() as leaves:
            for n, leaf in leaves.items():
                torch.testing.assert_close(leaf, expected[n], rtol=1e-5, atol=1e-6)
    leave()


def test_gradients_are_reduced_while_the_step_runs(tmp_path: Path) -> None:
    mp.spawn(reduced_before_the_end, args=(tmp_path,), nprocs=REPLICAS)
