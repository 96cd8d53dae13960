"""The command `nesa-ray`: parse, call, print.

Exit status 0: done; 2: bad input, with one line that names it; 1: a failure.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nesa_ray.errors import InvalidConfig, NesaError

app = typer.Typer(
    name="nesa-ray",
    help="Cuts any PyTorch model for the machines at hand, then trains and serves it across them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def probe(out: Annotated[Path | None, typer.Option(help="where to write cluster.json")] = None) -> None:
    """Measure the live cluster: devices, memory, speed, and every pair of nodes' bandwidth and latency."""
    from nesa_ray.cluster.probe import probe as measure
    from nesa_ray.report import topology_table, write

    topology = measure()
    if out is not None:
        topology.to_json(out)
    write(topology_table(topology))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a training configuration (YAML)")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, instead of what the file says")] = None,
) -> None:
    """Train a model by a configuration, on the live cluster."""
    from nesa_ray.cluster.probe import connect
    from nesa_ray.report import plan_table, training_table, write
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer

    settings = TrainConfig.from_yaml(config, set_ or [])
    connect()
    with Trainer(settings) as trainer:
        write(plan_table(trainer.plan, trainer.costed, trainer.topology))
        write(training_table(trainer.fit()))


@app.command()
def serve(config: Annotated[Path, typer.Argument(help="a serving configuration (YAML)")]) -> None:
    """Serve a model by a configuration, on the live cluster, until interrupted."""
    from ray import serve as ray_serve

    from nesa_ray.cluster.probe import connect
    from nesa_ray.serving.config import ServeConfig
    from nesa_ray.serving.ingress import deployment

    settings = ServeConfig.from_yaml(config)
    _needs_free_port(settings.host, settings.port)
    connect()
    try:
        ray_serve.start(http_options={"host": settings.host, "port": settings.port})
        ray_serve.run(deployment(settings), name=settings.served_name, blocking=True)
    finally:
        ray_serve.shutdown()


def _needs_free_port(host: str, port: int) -> None:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as e:
            raise InvalidConfig(f"serve: port: {host}:{port} can't be used: {e.strerror}") from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the results go")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(help="how long to train")] = 120.0,
) -> None:
    """The whole path on this machine: corpus, plan, train with ZeRO, save, serve, complete a prompt."""
    from nesa_ray.demo import run

    run(out, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its status."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except NesaError as e:
        _fail(str(e), e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as e:
        if not hasattr(e, "format_message"):  # typer's own usage errors have it
            raise
        _fail(e.format_message(), 2)


def _fail(message: str, code: int) -> None:
    print(f"nesa-ray: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
