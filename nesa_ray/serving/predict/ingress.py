"""The Ray Serve deployment: HTTP in, rows batched by Serve, a Predictor in the same process, its stages as actors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from nesa_ray.cluster.probe import Probes
from nesa_ray.serving.config import BATCH, PredictConfig
from nesa_ray.serving.ingress import deploy, running
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.replicas import Share

if TYPE_CHECKING:
    from nesa_ray.errors import InvalidInput
    from nesa_ray.serving.predict.predictor import Batched, Compute, Entry, Predictor, Row


def deployment(config: PredictConfig) -> Application:
    """The model's application.  Raises InvalidConfig where there are no API keys."""
    return deploy("Predict", config, _start, _app, at_once=config.batch_size or BATCH, waiting=config.max_waiting)


def _start(config: PredictConfig, share: Share, name: str, probes: Probes) -> Predictor:
    from nesa_ray.serving.predict.predictor import Predictor, launch

    blueprint, stages = launch(config, probes, share=share, name=name)

    def batched(compute: Compute) -> Batched:
        async def batch(entries: list[Entry]) -> list[Row | InvalidInput]:
            return list(await compute(entries))

        size = blueprint.form.batch
        made: Batched = serve.batch(
            max_batch_size=size,
            batch_wait_timeout_s=config.batch_wait_s,
            max_concurrent_batches=-(-config.max_waiting // size),  # how many the stages can do with, `compute` knows
        )(batch)
        return made

    return Predictor(config, blueprint=blueprint, stages=stages, batched=batched)


def _app(config: PredictConfig, keys: ApiKeys) -> FastAPI:
    from nesa_ray.serving.predict.api import application

    return application(running, config, keys)
