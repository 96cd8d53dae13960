"""Joining the live Ray cluster; where there is none, starting one of this machine that ends with this process."""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import sys
from collections.abc import Collection

import psutil
import ray
from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import estimate_available_memory

from nesa_ray.cluster.local import LocalCluster, LocalNode
from nesa_ray.errors import InvalidTopology

MEMORY_SHARE = 0.8  # of what is free: the rest is for what isn't planned, from the driver to Ray's own processes
OBJECT_STORE_SHARE, MOST_OBJECT_STORE_BYTES = 0.1, 2_000_000_000
ANSWERS_S = 5.0  # Ray itself tries for minutes, and says so at length
_PRIVATE = re.compile(r"127\.(?!0\.)")  # where a LocalCluster listens: it takes in nobody but who started it


def connect(*, start: bool = False) -> None:
    """Joins the live Ray cluster, if this process hasn't yet: the one that RAY_ADDRESS names, else one on this machine.

    start  where none is named or found, one of this machine alone is started (LocalCluster), which ends with this
           process; it says so on stderr, as it takes some ten seconds

    Raises InvalidTopology when there is none to join, or one that is named or found can't be joined.
    """
    if ray.is_initialized():
        return
    named = os.environ.get("RAY_ADDRESS")
    if named and named != "auto":
        _join(named, "RAY_ADDRESS names it")
    elif address := choose(services.find_bootstrap_address(None), services._find_address_from_flag("--gcs-address")):
        logging.getLogger("ray").setLevel(logging.ERROR)  # as ray.init is told
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # which ray.init does for "auto" alone
        _join(address, "found on this machine; if it is over, `ray stop` forgets it")
    elif start:
        _start()
    else:
        raise InvalidTopology(
            "no live Ray cluster. Start one (`ray up cluster.yaml`, `ray start --head`), or describe the machines in a "
            "cluster.json"
        )


def choose(last: str | None, running: Collection[str]) -> str | None:
    """The cluster to join where none is named: as Ray does, but for LocalClusters of other processes.

    last     what the last `ray start` wrote down, which may be over
    running  of which there are processes on this machine
    Raises InvalidTopology when there are several to choose from.
    """
    joinable = sorted(a for a in running if not _PRIVATE.match(a))
    if last is not None and (last in joinable or not joinable):
        return last
    if len(joinable) > 1:
        raise InvalidTopology(f"several Ray clusters run here: name one in RAY_ADDRESS: {', '.join(joinable)}")
    return joinable[0] if joinable else None


def this_machine() -> LocalNode:
    """What this process may use of it, as one node whose cores the probe divides."""
    import torch

    free_bytes = min(psutil.virtual_memory().available, estimate_available_memory())  # Ray heeds a container's limit
    return LocalNode(
        name=socket.gethostname(),
        devices=None,
        memory_bytes=MEMORY_SHARE * free_bytes,
        gpus=tuple(range(torch.cuda.device_count())),
    )


def _join(address: str, why: str) -> None:
    try:
        if "://" not in address:  # those of Ray's client are its own
            host, _, port = (services.canonicalize_bootstrap_address(address) or "").rpartition(":")
            if not port.isdecimal():
                raise ValueError("needs host:port")
            socket.create_connection((host.strip("[]"), int(port)), ANSWERS_S).close()
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InvalidTopology(f"the Ray cluster at {address} can't be joined ({why}): {said}") from None


def _start() -> None:
    machine = this_machine()
    has = f"{len(machine.gpus)} GPUs" if machine.gpus else f"{len(os.sched_getaffinity(0))} cores"
    print(f"nesa_ray: no live Ray cluster: starting one of this machine, {has}", file=sys.stderr, flush=True)
    cluster = LocalCluster(
        [machine],
        dashboard=False,
        haproxy=True,
        object_store_bytes=int(min(MOST_OBJECT_STORE_BYTES, OBJECT_STORE_SHARE * machine.memory_bytes)),
    )
    cluster.__enter__()
    atexit.register(cluster.close)
    cluster.connect()
