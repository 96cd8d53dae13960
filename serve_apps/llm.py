"""An OpenAI-compatible endpoint:  serve run serve_apps.llm:build config=serve.yaml"""

from typing import Any

import yaml
from ray.serve import Application

from nesa_ray.errors import InvalidConfig
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.ingress import deployment


def build(args: dict[str, Any]) -> Application:
    """`config` names a YAML file; other arguments are ServeConfig's fields, and come before the file's.

    `serve run` passes every argument as text, which is read as YAML.  Raises InvalidConfig.
    """
    given = {k: yaml.safe_load(v) if isinstance(v, str) and k != "config" else v for k, v in args.items()}
    file = given.pop("config", None)
    if file is not None and not isinstance(file, str):
        raise InvalidConfig(f"serve: config: needs the path of a YAML file, got {file!r}")
    config = ServeConfig.from_yaml(file, **given) if file is not None else ServeConfig.from_dict(given)
    return deployment(config)
