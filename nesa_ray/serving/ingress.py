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

_MEASURED_EVERY_S = 10.0


class Ingress:
    """One replica: one engine over one pipeline.  Serve restarts it, stages and all, when its health check fails."""

    def __init__(self, config: ServeConfig) -> None:
        import torch

        torch.set_num_threads(1)  # it only builds small messages; the cores belong to the stages
        self.engine = Engine(config)
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
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close()


def deployment(config: ServeConfig) -> Application:
    """The application that `serve run` and `serve deploy` start.  Raises InvalidConfig where there are no API keys."""
    keys = ApiKeys.of(config)
    config = replace(config, api_keys=None)  # the keys themselves stay here

    def app() -> FastAPI:
        """Built in the replica, whose engine the routes then find."""
        return application(lambda: serve.get_replica_context().servable_object.engine, config, keys)

    described = serve.deployment(
        name="LLM",
        # The engine refuses what is too much, with 429; Serve's own queue would only hide it.
        max_ongoing_requests=2 * (config.max_sequences + config.max_waiting),
        ray_actor_options={"num_cpus": 0},  # the cluster's CPUs are for stages
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=20.0,
    )(serve.ingress(app)(Ingress))
    bound: Any = described.bind(config)
    return bound
