"""The command `nesa-ray`: parse, call, print.

Exit status 0: done; 2: bad input, with one line that names it; 1: a failure.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nesa_ray import errors
from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidConfig, NesaError

app = typer.Typer(
    name="nesa-ray",
    help="Cuts any PyTorch model for the machines at hand, then trains and serves it across them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    graph: Annotated[Path | None, typer.Option(help="a graph.json")] = None,
    model: Annotated[
        str | None, typer.Option(help="a Hugging Face directory or config.json, or module:function")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="a cluster.json; else the live cluster is measured")] = None,
    objective: Annotated[str, typer.Option(help="throughput or latency")] = "throughput",
    mode: Annotated[str, typer.Option(help="inference or training")] = "inference",
    stages: Annotated[int | None, typer.Option(help="exactly so many stages")] = None,
    replicas: Annotated[str, typer.Option(help="devices of each stage: a number, or auto")] = "1",
    zero: Annotated[int, typer.Option(help="ZeRO stage over a stage's replicas")] = 0,
    micro_batches: Annotated[int, typer.Option(help="micro-batches of a training step")] = 8,
    overlap: Annotated[bool, typer.Option("--overlap", help="transfers overlap with compute")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="recompute activations in the backward pass")] = False,
    cache_tokens: Annotated[int, typer.Option(help="tokens of context a served model keeps, over all sequences")] = 0,
    measure: Annotated[bool, typer.Option("--measure", help="time the model's operators on the devices")] = False,
    memory_margin: Annotated[float, typer.Option(help="part of each device's memory to leave free")] = 0.0,
    batch: Annotated[int, typer.Option(help="samples of a micro-batch, with --model")] = 1,
    tokens: Annotated[int, typer.Option(help="tokens of a sample, with --model")] = 128,
    max_seconds: Annotated[float, typer.Option(help="how long to search")] = 15.0,
    seed: Annotated[int, typer.Option(help="makes the search repeatable")] = 0,
    pareto: Annotated[bool, typer.Option("--pareto", help="list the plans that trade throughput for latency")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="say what bounds the plan and what would help")] = False,
    out: Annotated[Path | None, typer.Option(help="where to write plan.json")] = None,
    html: Annotated[Path | None, typer.Option(help="where to write a picture of the plan")] = None,
    graph_out: Annotated[Path | None, typer.Option(help="where to write the graph with the costs planned for")] = None,
) -> None:
    """Partition a model for a cluster; print the plan, its bottleneck, lower bound and gap."""
    from nesa_ray.graph.graph import Graph
    from nesa_ray.planning.explain import explain as explained
    from nesa_ray.planning.partition import pareto as pareto_front
    from nesa_ray.planning.partition import partition, planned_costs
    from nesa_ray.planning.picture import html as picture
    from nesa_ray.report import pareto_table, plan_table, planning_progress, telling, write

    if model is not None:
        from nesa_ray.graph.models import capture_ref
        from nesa_ray.runtime.profile import measure_here, measure_live

    if (graph is None) == (model is None):
        raise InvalidConfig("plan: needs --graph or --model, and not both")
    if measure and model is None:
        raise InvalidConfig("plan: --measure: needs --model, a graph.json can't be run")
    count = _replicas(replicas)
    topology = _topology(cluster, (stages or 1) * (count if isinstance(count, int) else 1))
    costs: dict[str, Any] = {
        "zero": zero, "recompute": recompute, "micro_batches": micro_batches, "cache_tokens": cache_tokens,
    }  # fmt: skip
    if graph is not None:
        computation = Graph.from_json(graph)
    else:
        with telling("capturing the model"):
            captured = capture_ref(str(model), batch=batch, tokens=tokens)
        computation = captured.graph
        if measure:
            with telling("measuring its operators on the devices"):
                costs["seconds"], topology = (measure_here if cluster else measure_live)(captured, topology, mode)
    options: dict[str, Any] = {"replicas": count, "memory_margin": memory_margin, **costs}
    with planning_progress(max_seconds) as report:
        result = partition(
            computation, topology, objective, mode, stages=stages, seed=seed, max_seconds=max_seconds,
            overlap=overlap, report=report, **options,
        )  # fmt: skip
    costed = planned_costs(
        computation, topology, mode, stages=stages, replicas=result.replicas, overlap=overlap, **costs
    )
    write(plan_table(result, costed, topology))
    if explain:
        about = explained(result, computation, costed, topology, seed=seed, **options)
        write("\n".join(about.lines()))
    if pareto:
        front = pareto_front(
            computation, topology, mode=mode, seed=seed, overlap=overlap, max_seconds=max_seconds / 4, **options
        )
        write(pareto_table(front))
    if html is not None:
        _written(html, lambda: html.write_text(picture(result, costed, topology), encoding="utf-8"))
    if graph_out is not None:
        _written(graph_out, lambda: costed.to_json(graph_out))
    if out is not None:
        _written(out, lambda: result.to_json(out))


def _topology(cluster: Path | None, devices: int) -> Topology:
    """The given cluster, or the live one measured, divided into so many devices if it can be (`probe`)."""
    if cluster is not None:
        return Topology.from_json(cluster)
    from nesa_ray.cluster.probe import probe as measure

    return measure(devices=devices)


def _replicas(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidConfig(f"plan: --replicas: needs a number or auto, got {text!r}") from None


def _written(path: Path, write_it: Callable[[], object]) -> None:
    """Writes a file; a place that can't be written is bad input."""
    try:
        write_it()
    except OSError as e:
        raise InvalidConfig(f"plan: {path}: can't be written: {e.strerror}") from None


@app.command()
def probe(
    out: Annotated[Path | None, typer.Option(help="where to write cluster.json")] = None,
    devices: Annotated[
        int, typer.Option(help="at least so many, if hosts without GPUs and labels can be divided into them")
    ] = 1,
) -> None:
    """Measure the live cluster: devices, memory, speed, and every pair of nodes' bandwidth and latency."""
    from nesa_ray.cluster.probe import probe as measure
    from nesa_ray.report import telling, topology_table, write

    with telling("measuring the cluster"):
        topology = measure(devices=devices)
    if out is not None:
        topology.to_json(out)
    write(topology_table(topology))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a training configuration (YAML)")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, instead of what the file says")] = None,
) -> None:
    """Train a model by a configuration, on the live cluster, or on this machine where there is none."""
    from nesa_ray.report import plan_table, telling, training_table, write
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer

    settings = TrainConfig.from_yaml(config, set_ or [])
    with telling("capturing, joining the cluster, planning, starting the stages"):
        trainer = Trainer(settings)
    with trainer:
        write(plan_table(trainer.plan, trainer.captured.graph, trainer.topology))
        write(trainer.outlook)
        write(training_table(trainer.fit()))


@app.command()
def rehearse(
    config: Annotated[Path, typer.Argument(help="a training configuration (YAML)")],
    cluster: Annotated[Path, typer.Option(help="the cluster.json of the machines it is for")],
    steps: Annotated[int, typer.Option(help="how many steps to run")] = 5,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, instead of what the file says")] = None,
) -> None:
    """Run a few training steps on this machine as on another cluster: its plan, and its links as slow as they are."""
    from nesa_ray.report import plan_table, telling, training_table, write
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.rehearsal import rehearsing

    settings, topology = TrainConfig.from_yaml(config, set_ or []), Topology.from_json(cluster)
    if steps < 2:
        raise InvalidConfig(f"rehearse: steps: needs at least 2, the first warms up, got {steps}")
    with contextlib.ExitStack() as stack:
        with telling("starting a local cluster, capturing, planning, starting the stages"):
            trainer = stack.enter_context(rehearsing(settings, topology, steps))
        write(plan_table(trainer.plan, trainer.captured.graph, trainer.topology))
        write(trainer.outlook)
        write(training_table(trainer.fit()))


@app.command()
def serve(config: Annotated[Path, typer.Argument(help="a serving configuration (YAML)")]) -> None:
    """Serve a decoder by a configuration, OpenAI-compatible, until interrupted.

    On the live cluster, or on this machine where there is none.
    """
    from nesa_ray.serving.config import ServeConfig

    _serve(ServeConfig.from_yaml(config), "nesa_ray.serving.ingress")


@app.command()
def predict(config: Annotated[Path, typer.Argument(help="a prediction configuration (YAML)")]) -> None:
    """Serve any other model by a configuration, rows in and rows out, until interrupted.

    On the live cluster, or on this machine where there is none.
    """
    from nesa_ray.serving.config import PredictConfig

    _serve(PredictConfig.from_yaml(config), "nesa_ray.serving.predict.ingress")


def _serve(settings: Any, ingress: str) -> None:
    """Runs the application that the module `ingress` makes."""
    from nesa_ray.cluster.joining import connect

    _needs_free_port(settings.host, settings.port)
    connect(start=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C; Ray's own handler aborts
    from ray import serve as ray_serve  # once a cluster of ours has said how: Serve reads its settings when imported

    deployment = importlib.import_module(ingress).deployment
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
        ray_serve.run(deployment(settings), name=settings.served_name, blocking=True)
    except RuntimeError:
        if (error := _why(ray_serve.status().applications.get(settings.served_name))) is not None:
            raise error from None
        raise
    finally:
        ray_serve.shutdown()


def _why(application: Any) -> NesaError | None:
    """What a replica raised, and Serve tells as the last line of a trace, if that was meant for the user."""
    for deployment in application.deployments.values() if application is not None else ():
        said = re.search(r"^nesa_ray\.errors\.(\w+): (.*)\Z", deployment.message.rstrip(), re.MULTILINE | re.DOTALL)
        if said is not None:
            kind: type[NesaError] = getattr(errors, said[1])
            return kind(said[2])
    return None


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
