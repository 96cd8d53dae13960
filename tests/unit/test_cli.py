"""The command: bad input is one line that names it, and exit 2; nothing is written."""

import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from nesa_ray.cli import _why, main
from nesa_ray.errors import Infeasible

TRAIN = {"model": "config.json", "data": {"paths": ["tokens.parquet"]}, "output": "out"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must fail with exit 2 and one line; returns the line."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, r"train: stepz: unknown field \(did you mean 'steps'\?\)"),
        ({"steps": "many"}, 'train: steps: needs an integer, got "many"'),
        ({"steps": 0}, "train: steps: needs an integer ≥ 1, got 0"),
        ({"zero": 4}, "train: zero: needs 0, 1, 2 or 3, got 4"),
        ({"schedule": "1f1"}, "train: schedule: needs auto or one of .*, got '1f1'"),
        ({"optimizer": {"rate": 1}}, r"train\.optimizer: rate: unknown field"),
        ({"data": {}}, r"train\.data: paths: missing, needs a value"),
        ({"model": "nowhere.module:function"}, "vocab_size: missing"),
    ],
)
def test_training_configuration(run: Callable[..., str], tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({**TRAIN, **change}))
    assert re.search(message, run("train", str(file)))
    assert [p.name for p in tmp_path.iterdir()] == ["train.yaml"]


def test_override_that_is_no_assignment(run: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(TRAIN))
    assert "--set: needs key=value, got 'steps'" in run("train", str(file), "--set", "steps")
    assert "steps: needs an integer ≥ 1, got -1" in run("train", str(file), "--set", "steps=-1")


@pytest.mark.parametrize("arguments", [["bogus"], ["train"], ["demo", "--seconds", "x"], ["plan", "--graf", "x"]])
def test_usage(run: Callable[..., str], arguments: list[str]) -> None:
    assert run(*arguments).startswith("nesa-ray: ")


def test_missing_file(run: Callable[..., str]) -> None:
    assert "nowhere.yaml: can't be read: No such file" in run("train", "nowhere.yaml")


@pytest.mark.parametrize("command", ["serve", "predict"])
def test_port_in_use(run: Callable[..., str], tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump({"model": str(tmp_path), "port": port}))
        assert f"serve: port: 127.0.0.1:{port} can't be used: Address already in use" in run(command, str(file))


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ("Error:\n  File x, line 1\nnesa_ray.errors.Infeasible: stages: 3 need 3 devices, there are 2", Infeasible),
        ("Error:\nValueError: what", None),
        ("", None),
    ],
)
def test_what_a_replica_raised_for_the_user_is_told_as_that(told: str, error: type | None) -> None:
    why = _why(SimpleNamespace(deployments={"LLM": SimpleNamespace(message=told)}))
    assert type(why) is (error or type(None))
    assert error is None or str(why) == "stages: 3 need 3 devices, there are 2"
    assert _why(None) is None
