import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from ray.util.state import list_actors

from nesa_ray.cluster.local import LocalCluster
from nesa_ray.cluster.probe import live_nodes, probe
from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible, InvalidTopology, Timeout
from nesa_ray.runtime.placement import Placement, Seat, place
from tests.unit.models import plan_on


def topology_of(cores: int = 1) -> Topology:
    first = tuple(sorted(os.sched_getaffinity(0)))[:2]
    return Topology(
        tuple(
            Device(id=f"{n}/cpu{i}", kind="cpu", node=n, cores=first[i % len(first) :][:cores], niceness=niceness)
            for n, niceness in (("big", 0), ("small", 5))
            for i in range(2)
        )
    )


class Sitter:
    def __init__(self, seat: Seat) -> None:
        self.where = seat.pin()

    def report(self) -> dict:
        torch.rand(256, 256) @ torch.rand(256, 256)
        bound = set()

        def look(thread: int) -> None:
            with contextlib.suppress(ProcessLookupError):  # a thread of Ray's that has ended meanwhile
                cores = tuple(sorted(os.sched_getaffinity(thread)))
                bound.add((cores, os.getpriority(os.PRIO_PROCESS, thread)))

        for task in Path("/proc/self/task").iterdir():
            look(int(task.name))
        late = threading.Thread(target=lambda: look(threading.get_native_id()))
        late.start()
        late.join()
        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "bound": bound,
            "threads": torch.get_num_threads(),
            "where": self.where,
        }


def sit(placement: Placement) -> dict[tuple[int, int], dict]:
    actors = {
        key: ray.remote(Sitter).options(**placement.options(*key)).remote(seat) for key, seat in placement.seat.items()
    }
    return dict(zip(actors, ray.get([a.report.remote() for a in actors.values()], timeout=120), strict=True))


def test_actors_sit_where_the_plan_said(cluster: LocalCluster) -> None:
    # Crosswise on purpose: Ray, left alone, would pack the first stages onto the head.
    plan, topology = plan_on(("small/cpu1", "big/cpu0"), ("big/cpu1", "small/cpu0")), topology_of()
    with place(plan, topology) as placement:
        reports = sit(placement)
    nodes = live_nodes()
    assert len(reports) == 4
    for (stage, replica), report in reports.items():
        device = topology.device[plan.stages[stage].devices[replica]]
        assert report == {
            "node_id": nodes[device.node]["NodeID"],
            "bound": {(device.cores, device.niceness)},
            "threads": 1,
            "where": "cpu",
        }


def test_a_plan_that_the_live_cluster_cannot_seat(cluster: LocalCluster) -> None:
    elsewhere = Topology((Device(id="x/cpu0", kind="cpu", node="x", cores=(0,)),))
    with pytest.raises(InvalidTopology, match=r"stage 0: needs node 'x', the live nodes are big, small"):
        place(plan_on(("x/cpu0",)), elsewhere)
    gpu = Topology((Device(id="small/gpu0", kind="gpu", node="small"),))
    with pytest.raises(Infeasible, match=r"node small: the plan needs 1 GPU, the node has 0"):
        place(plan_on(("small/gpu0",)), gpu)
    wide = Topology((Device(id="small/cpu0", kind="cpu", node="small", cores=tuple(range(9))),))
    with pytest.raises(Infeasible, match=r"node small: the plan needs 9 CPU, the node has 2"):
        place(plan_on(("small/cpu0",)), wide)


def test_seats_that_others_hold_time_out_and_are_free_after_close(cluster: LocalCluster) -> None:
    topology = topology_of()
    both = plan_on(("small/cpu0",), ("small/cpu1",))
    with place(both, topology):
        start = time.monotonic()
        with pytest.raises(Timeout, match=r"2 seats were not free within 1 s: needed small 2 CPU; free .* 4 CPU"):
            place(both, topology, max_seconds=1.0)
        assert time.monotonic() - start < 5
    with place(both, topology, max_seconds=20.0):
        pass


def test_probe_describes_the_unequal_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    topology = probe()
    assert [d.id for d in topology.devices] == ["big/cpu0", "big/cpu1", "small/cpu0", "small/cpu1"]
    cores = [c for n in cluster.nodes for c in n.resolved_cores()]
    assert [d.cores for d in topology.devices] == cores
    assert [d.memory_bytes for d in topology.devices] == [2e9, 2e9, 1e9, 1e9]
    assert [d.niceness for d in topology.devices] == [0, 0, 5, 5]
    assert all(d.flops_per_s > 1e8 and d.memory_bytes_per_s > 1e7 for d in topology.devices)
    # Niceness 5 has a third of the weight of niceness 0 on the same core.
    big, small = (sum(d.flops_per_s for d in topology.devices if d.node == n) for n in ("big", "small"))
    assert big > 1.3 * small
    link = topology.link("big", "small")
    assert frozenset(("big", "small")) in topology.pairs
    for one in (link, topology.default):
        assert 1e6 < one.bytes_per_s < math.inf
        assert 0 < one.latency_s < 0.1
    topology.to_json(tmp_path / "cluster.json")
    assert Topology.from_json(tmp_path / "cluster.json") == topology
    for _ in range(100):
        if not list_actors(filters=[("class_name", "=", "Probe"), ("state", "!=", "DEAD")]):
            return
        time.sleep(0.1)
    raise AssertionError("probe actors are still alive")


def test_a_probe_out_of_time_says_what_it_waited_for(cluster: LocalCluster) -> None:
    with pytest.raises(Timeout, match=r"starting the probes .*: not done within 0.01 s; waiting for big/cpu0"):
        probe(max_seconds=0.01)


KILLED = """
import os, json
from nesa_ray.cluster.local import LocalCluster, LocalNode
with LocalCluster([LocalNode(name="one")], dashboard=False) as cluster:
    cluster.connect()
    import ray
    class Holder:
        def pid(self): return os.getpid()
    holder = ray.remote(Holder).remote()
    worker = ray.get(holder.pid.remote())
    supervisor = cluster._process
    print(json.dumps({"worker": worker, "supervisor": supervisor.pid, "directory": supervisor.args[-1]}), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_cluster_ends_with_its_process_even_when_that_is_killed() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    out = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        env=environment,
        timeout=120,
    )
    said = json.loads(out.stdout.decode().splitlines()[-1])
    assert out.returncode == -9
    for _ in range(150):
        gone = not any(Path(f"/proc/{said[p]}").exists() for p in ("worker", "supervisor"))
        if gone and not Path(said["directory"]).exists():
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"left behind: {said}")
    assert not [p for p in Path("/proc").glob("[0-9]*/stat") if session_of(p) == str(said["supervisor"])]


def session_of(stat: Path) -> str | None:
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[3]
    return None
