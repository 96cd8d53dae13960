"""The labels a Ray node carries for us (`ray start --labels`), and how they read.  No Ray here.

nesa-node       the node's name in a Topology; without it the host's
nesa-cores      the cores of each CPU device, devices divided by dots, cores by underscores or as ranges:
                "0.1" two devices of one core, "0-3.4-7" two of four, "0_2_4" one of three; without it the node's Ray
                CPUs are one device, or as many equal ones as are asked for.  A Ray label holds 63 characters.
nesa-niceness   0-19: the niceness of what is pinned there
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nesa_ray.errors import InvalidTopology

NODE = "nesa-node"
CORES = "nesa-cores"
NICENESS = "nesa-niceness"
RAY_NODE_ID = "ray.io/node-id"

MAX_LABEL = 63


def cores_to_label(devices: Sequence[Sequence[int]]) -> str:
    """The shortest label; raises InvalidTopology when it is longer than Ray allows."""
    label = ".".join("_".join(_ranges(cores)) for cores in devices)
    if len(label) > MAX_LABEL:
        raise InvalidTopology(f"{CORES}: {len(devices)} devices need {len(label)} characters, a label has {MAX_LABEL}")
    return label


def label_to_cores(label: str) -> tuple[tuple[int, ...], ...]:
    """The cores of each device; raises InvalidTopology."""
    devices = []
    for part in label.split("."):
        cores: list[int] = []
        for span in part.split("_"):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
            if match is None:
                raise InvalidTopology(f'{CORES}: needs core numbers like "0.1" or "0-3.4-7", got {label!r}')
            first = int(match[1])
            cores.extend(range(first, int(match[2] or first) + 1))
        devices.append(tuple(cores))
    return tuple(devices)


def _ranges(cores: Sequence[int]) -> list[str]:
    spans: list[list[int]] = []
    for c in cores:
        if spans and c == spans[-1][1] + 1:
            spans[-1][1] = c
        else:
            spans.append([c, c])
    return [str(a) if a == b else f"{a}-{b}" for a, b in spans]
