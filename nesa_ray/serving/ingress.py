"""The Ray Serve deployment: HTTP in, an Engine in the same process, its stages as plain actors."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from nesa_ray.serving.api import application
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.edge import ApiKeys
from nesa_ray.serving.engine import FAILED, Engine
from nesa_ray.serving.replicas import Claim
from nesa_ray.serving.stages import launch

_MEASURED_EVERY_S = 10.0


def _drain_s(config: ServeConfig) -> float:
    """Seconds in which a replica that is stopped has surely ended what it had begun, and itself."""
    return config.request_timeout_s + 30.0


class Ingress:
    """One replica: one engine over one pipeline.  Serve restarts it, stages and all, when its health check fails."""

    def __init__(self, config: ServeConfig) -> None:
        import torch

        torch.set_num_threads(1)  # it only builds small messages; the cores belong to the stages
        context = serve.get_replica_context()
        self._claim = Claim(f"{context.app_name}/{context.deployment}", config.shares, _drain_s(config))
        try:
            blueprint, stages = launch(config, share=self._claim.share, name=self._claim.name)
            self.engine = Engine(config, blueprint=blueprint, stages=stages)
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


def deployment(config: ServeConfig) -> Application:
    """The application that `serve run` and `serve deploy` start.  Raises InvalidConfig where there are no API keys."""
    keys = ApiKeys.of(config)
    config = replace(config, api_keys=None)  # the keys themselves stay here

    def app() -> FastAPI:
        """Built in the replica, whose engine the routes then find."""
        return application(lambda: serve.get_replica_context().servable_object.engine, config, keys)

    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.shares > config.replicas:
        target = config.target_requests or config.max_sequences
        limits = {"min_replicas": config.replicas, "max_replicas": config.shares}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": target}}
    described = serve.deployment(
        name="LLM",
        # The engine refuses what is too much, with 429; Serve's own queue would only hide it.
        max_ongoing_requests=2 * (config.max_sequences + config.max_waiting),
        ray_actor_options={"num_cpus": 0},  # the cluster's CPUs are for stages
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=_drain_s(config),
        graceful_shutdown_wait_loop_s=0.5,
        **scaling,
    )(serve.ingress(app)(Ingress))
    bound: Any = described.bind(config)
    return bound
