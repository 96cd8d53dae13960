"""A Python function that runs in a process on an emulated host, with a pipe to it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


class HostProcess:
    """A Python function that runs on a host.  Inside `with`, at whose end it is gone.

    pipe    whatever it sends; raises EOFError once it has ended
    popen   its process
    """

    def __init__(self, popen: subprocess.Popen[Any], pipe: Connection) -> None:
        self.popen, self.pipe = popen, pipe

    def close(self, max_seconds: float = 5.0) -> None:
        """Closes the pipe and waits for the function to end by that; then it is killed.  Idempotent."""
        self.pipe.close()
        try:
            self.popen.wait(max_seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(5.0 if kind is None else 0.0)


def reference(function: Callable[..., object]) -> tuple[str, str]:
    """The module and name by which another process finds a function; a script's module goes by its file."""
    module = function.__module__
    if module == "__main__":
        file = Path(str(sys.modules["__main__"].__file__)).resolve()
        parent = next(p for p in map(Path, sys.path) if file.is_relative_to(p.resolve()))
        module = ".".join(file.relative_to(parent.resolve()).with_suffix("").parts)
    return module, function.__qualname__


def _find(name: tuple[str, str]) -> Any:
    found: Any = importlib.import_module(name[0])
    for part in name[1].split("."):
        found = getattr(found, part)
    return found


def be_called(fd: int) -> None:
    """What the process of EmulatedHosts.start runs."""
    with Connection(fd) as pipe:
        found, args = pipe.recv()
        _find(found)(pipe, *args)


def answer(pipe: Connection, function: tuple[str, str], args: Sequence[Any]) -> None:
    """What EmulatedHosts.call runs: sends (True, the function's value), or (False, its traceback)."""
    try:
        pipe.send((True, _find(function)(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc().rstrip()))
