"""What the tests run on emulated hosts.  Light to import: every call does."""

import contextlib
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path


def echo(pipe: Connection, ip: str) -> None:
    """Sends back what comes over each connection, until the pipe is closed; then this process ends."""

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while chunk := connection.recv(1 << 16):
            connection.sendall(chunk)

    def accept(server: socket.socket) -> None:
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    server = socket.create_server((ip, 0))
    threading.Thread(target=accept, args=(server,), daemon=True).start()
    pipe.send(server.getsockname())
    with contextlib.suppress(EOFError):
        pipe.recv()


def trips(address: tuple[str, int], count: int, n_bytes: int = 1) -> list[float]:
    """The seconds of round trips of so many bytes."""
    seconds = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start, left = time.monotonic(), n_bytes
            connection.sendall(bytes(n_bytes))
            while left:
                left -= len(connection.recv(left))
            seconds.append(time.monotonic() - start)
    return seconds


def receive_numbers(pipe: Connection, ip: str) -> None:
    """The numbers that came by UDP until none came for half a second."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((ip, 0))
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        pipe.send(receiver.getsockname())
        numbers: list[int] = []
        receiver.settimeout(5.0)
        with contextlib.suppress(TimeoutError):
            while True:
                numbers.append(int(receiver.recv(100)))
                receiver.settimeout(0.5)
        pipe.send(numbers)


def send_numbers(address: tuple[str, int], count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for i in range(count):
            sender.sendto(str(i).encode(), address)
            if i % 20 == 0:
                time.sleep(0.001)


def describe() -> dict[str, object]:
    Path("/dev/shm/mine").touch()
    Path("/tmp/ray/mine").touch()
    return {
        "name": socket.gethostname(),
        "ip": socket.gethostbyname(socket.gethostname()),
        "processes": len([p for p in Path("/proc").iterdir() if p.name.isdigit()]),
        "cores": sorted(os.sched_getaffinity(0)),
        "shm": os.listdir("/dev/shm"),
        "ray": os.listdir("/tmp/ray"),
    }


class Where:
    def name(self) -> str:
        return socket.gethostname()


def drive() -> dict[str, object]:
    """A driver: who the nodes are, and where an actor sits that is sent to the second."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nesa_ray.cluster.joining import connect
    from nesa_ray.cluster.probe import live_nodes

    connect()
    nodes = live_nodes()
    there = NodeAffinitySchedulingStrategy(nodes["two"]["NodeID"], soft=False)
    actor = ray.remote(Where).options(num_cpus=0, scheduling_strategy=there).remote()
    return {
        "nodes": {name: (node["NodeManagerAddress"], node["Resources"]["memory"]) for name, node in nodes.items()},
        "sits on": ray.get(actor.name.remote(), timeout=60),
        "authentication": os.environ["RAY_AUTH_MODE"],
    }


def train_and_decode(pipe: Connection, directory: str) -> None:
    """A driver of two stages that train and two that serve: (losses, tokens) of so many steps as it is sent.

    Each time the same: the training begins again, the prompts are the same.
    """
    from concurrent.futures import ThreadPoolExecutor

    import ray

    from nesa_ray.serving.config import ServeConfig
    from nesa_ray.serving.engine import Engine
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    training = {
        "model": f"{directory}/model", "data": {"paths": [f"{directory}/train.parquet"], "sequence_length": 32},
        "output": f"{directory}/out", "cluster": f"{directory}/cluster.json", "stages": 2, "micro_batch_size": 2,
        "microbatches": 4, "zero": 0, "optimizer": {"lr": 1e-2}, "warmup_steps": 0, "measure": False,
    }  # fmt: skip
    served = ServeConfig(model=f"{directory}/model", cluster=f"{directory}/cluster.json", stages=2)
    with Engine(served) as engine, contextlib.suppress(EOFError), ThreadPoolExecutor(4) as pool:
        while True:
            steps = pipe.recv()
            with Trainer(TrainConfig.from_dict(training), show_progress=False) as trainer:
                trainer.pipeline.call("steps", 0, [1e-2])
                pipe.send("begun")
                texts = [
                    pool.submit(engine.generate, [3 + i] * 8, max_tokens=24, temperature=0, ignore_eos=True)
                    for i in range(3)
                ]
                found = trainer.pipeline.call("steps", 1, [1e-2] * steps)
                losses = [r.loss for of in found.values() for r in of if r.loss is not None]
            pipe.send((losses, [t.result().token_ids for t in texts]))
