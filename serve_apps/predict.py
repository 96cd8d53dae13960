"""Any other model than a decoder, rows in and rows out:  serve run serve_apps.predict:build config=predict.yaml"""

from typing import Any

from ray.serve import Application

from nesa_ray.serving.config import PredictConfig
from nesa_ray.serving.predict.ingress import deployment


def build(args: dict[str, Any]) -> Application:
    """`config` names a YAML file; other arguments are PredictConfig's fields, and come before the file's.

    Raises InvalidConfig.
    """
    return deployment(PredictConfig.from_arguments(args))
