"""The Ray Serve deployment: HTTP in, an Engine in the same process, its stages as plain actors.

What only the replica needs is imported there: Serve builds an application in a process of its own, which waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from nesa_ray.cluster.probe import Probes
from nesa_ray.garbage import kept
from nesa_ray.serving.config import EndpointConfig, ServeConfig
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.replicas import Claim, Share, stage_probes
from nesa_ray.serving.running import FAILED, Running

if TYPE_CHECKING:
    from nesa_ray.serving.engine import Engine

_MEASURED_EVERY_S = 10.0
C = TypeVar("C", bound=EndpointConfig)
Start = Callable[[C, Share, str, Probes], Running]  # (configuration, share of the devices, its name, actors there)


def _drain_s(config: EndpointConfig) -> float:
    """Seconds in which a replica that is stopped has surely ended what it had begun, and itself."""
    return config.request_timeout_s + 30.0


class Ingress:
    """One replica: one engine over one pipeline.  Serve restarts it, stages and all, when its health check fails."""

    def __init__(self, config: EndpointConfig, start: Start[Any]) -> None:
        told = logging.getLogger("nesa_ray")  # by Serve's log, which `serve run` shows
        told.parent, told.level = logging.getLogger("ray.serve"), logging.INFO
        context = serve.get_replica_context()
        self._claim = Claim(f"{context.app_name}/{context.deployment}", config.shares, _drain_s(config))
        try:
            # The probes' processes start while this one imports.
            with kept(), stage_probes(config, self._claim.share) as probes:
                import torch

                torch.set_num_threads(1)  # it only builds small messages; the cores belong to the stages
                self.engine = start(config, self._claim.share, self._claim.name, probes)
        except BaseException:
            self._claim.release()
            raise
        threading.Thread(target=self._measure, name="metrics", daemon=True).start()

    def _measure(self) -> None:
        """Ray exports the gauges' last values: they are brought up to date as often as it does."""
        while self.engine.state != FAILED:
            self.engine.measure()
            time.sleep(_MEASURED_EVERY_S)

    def check_health(self) -> None:
        """Called by Serve."""
        self.engine.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica is stopped, after the requests under way have ended."""
        if hasattr(self, "engine"):
            self.engine.close()
            self._claim.release()


def running() -> Any:
    """What this replica runs: its engine."""
    return serve.get_replica_context().servable_object.engine


def deploy(
    name: str, config: C, start: Start[C], app: Callable[[C, ApiKeys], FastAPI], *, at_once: int, waiting: int
) -> Application:
    """The application that `serve run` and `serve deploy` start: a deployment of that name.

    start    makes what a replica runs
    app      makes its HTTP application, in the replica
    at_once  requests that a replica computes at the same time;  waiting  those that it lets wait besides
    Raises InvalidConfig where there are no API keys.
    """
    keys = ApiKeys.of(config)
    config = replace(config, api_keys=None)  # the keys themselves stay here

    def built() -> FastAPI:
        return app(config, keys)

    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.shares > config.replicas:
        limits = {"min_replicas": config.replicas, "max_replicas": config.shares}
        target = config.target_requests or at_once
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": target}}
    described = serve.deployment(
        name=name,
        # The engine refuses what is too much, with 429; Serve's own queue would only hide it.
        max_ongoing_requests=2 * (at_once + waiting),
        ray_actor_options={"num_cpus": 0},  # the cluster's CPUs are for stages
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=_drain_s(config),
        graceful_shutdown_wait_loop_s=0.5,
        **scaling,
    )(serve.ingress(built)(Ingress))
    bound: Any = described.bind(config, start)
    return bound


def deployment(config: ServeConfig) -> Application:
    """A decoder's application.  Raises InvalidConfig where there are no API keys."""
    return deploy("LLM", config, _start, _app, at_once=config.max_sequences, waiting=config.max_waiting)


def _start(config: ServeConfig, share: Share, name: str, probes: Probes) -> Engine:
    from nesa_ray.serving.engine import Engine
    from nesa_ray.serving.stages import launch

    blueprint, stages = launch(config, probes, share=share, name=name)
    return Engine(config, blueprint=blueprint, stages=stages)


def _app(config: ServeConfig, keys: ApiKeys) -> FastAPI:
    from nesa_ray.serving.api import application

    return application(running, config, keys)
