"""nesa_ray: cuts any PyTorch model for the machines at hand, then trains and serves it across them.

Names are loaded when they are first used, so that the planner works where torch or Ray is missing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nesa_ray.version import __version__

if TYPE_CHECKING:
    from nesa_ray.cluster.probe import probe
    from nesa_ray.cluster.topology import Device, Link, Topology
    from nesa_ray.errors import NesaError
    from nesa_ray.graph.capture import Captured, capture
    from nesa_ray.graph.graph import Graph, Node
    from nesa_ray.graph.models import capture_ref
    from nesa_ray.planning.partition import partition
    from nesa_ray.planning.plan import Plan, Stage
    from nesa_ray.runtime.local import LocalPipeline
    from nesa_ray.runtime.pipeline import launch
    from nesa_ray.serving.config import ServeConfig
    from nesa_ray.serving.engine import Engine
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer, train

_HOME = {
    "Captured": "graph.capture",
    "Device": "cluster.topology",
    "Engine": "serving.engine",
    "Graph": "graph.graph",
    "Link": "cluster.topology",
    "LocalPipeline": "runtime.local",
    "NesaError": "errors",
    "Node": "graph.graph",
    "Plan": "planning.plan",
    "ServeConfig": "serving.config",
    "Stage": "planning.plan",
    "Topology": "cluster.topology",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "capture": "graph.capture",
    "capture_ref": "graph.models",
    "launch": "runtime.pipeline",
    "partition": "planning.partition",
    "probe": "cluster.probe",
    "train": "training.trainer",
}

__all__ = [
    "Captured", "Device", "Engine", "Graph", "Link", "LocalPipeline", "NesaError", "Node", "Plan", "ServeConfig",
    "Stage", "Topology", "TrainConfig", "Trainer", "__version__", "capture", "capture_ref", "launch", "partition",
    "probe", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"nesa_ray.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nesa_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
