"""An OpenAI-compatible endpoint:  serve run serve_apps.llm:build config=serve.yaml"""

from typing import Any

from ray.serve import Application

from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.ingress import deployment


def build(args: dict[str, Any]) -> Application:
    """`config` names a YAML file; other arguments are ServeConfig's fields, and come before the file's.

    Raises InvalidConfig.
    """
    return deployment(ServeConfig.from_arguments(args))
