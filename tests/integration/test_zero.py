"""What a stage's optimizer holds: measured in two processes over gloo, against the planner's formula."""

import gc
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nesa_ray.planning.costing import optimizer_factor
from nesa_ray.runtime.gradients import StepGradients
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


def replica(rank: int, zero: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=REPLICAS)
    held = most_held(zero)
    Path(out, str(rank)).write_text(str(held))
    dist.destroy_process_group()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_held_bytes_are_the_formulas(zero: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(replica, args=(zero, port, str(tmp_path)), nprocs=REPLICAS)
    for rank in range(REPLICAS):
        held = float((tmp_path / str(rank)).read_text())
        assert held == pytest.approx(optimizer_factor(zero, REPLICAS), rel=0.05)
