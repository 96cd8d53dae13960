"""Compiles kernels.cpp for this machine, once: the result is kept by what went into it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.cpp")
# Not -ffast-math: linked with it, a library changes how the whole process rounds denormal numbers.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-fno-signed-zeros", "-ffinite-math-only", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be compiled (the reason is logged once).

    NESA_RAY_NATIVE=0 switches them off.
    """
    if os.environ.get("NESA_RAY_NATIVE") == "0":
        return None
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        log.info("no C++ compiler: serving uses torch's operators")
        return None
    key = hashlib.sha256("\n".join([compiler, *FLAGS, _processor(), SOURCE.read_text()]).encode()).hexdigest()[:24]
    library = _cache_directory() / f"kernels-{key}.so"
    try:
        if not library.is_file():
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as e:
        said = e.stderr.strip().splitlines()[0] if isinstance(e, subprocess.CalledProcessError) and e.stderr else e
        log.warning("kernels.cpp can't be compiled by %s (%s): serving uses torch's operators", compiler, said)
        return None


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(library)  # whole or not at all, whoever else compiles it at the same time


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nesa_ray"


def _processor() -> str:
    """What -march=native depends on: nodes of different kinds may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(dict.fromkeys(x for x in lines if x.startswith(("flags", "Features", "model name"))))
