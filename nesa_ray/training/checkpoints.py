"""Checkpoints of a run: a directory per step, written in the background, whole or not there.

output/checkpoints/step-00000100/ holds a safetensors file per stage with the stage's parameters and buffers by name and
the optimizer's moments as "optimizer/exp_avg/NAME" and "optimizer/exp_avg_sq/NAME", whole and not sharded, an index of
which tensor is in which file, and state.json (step, place in the data).  So it loads under any other number of stages,
replicas or ZeRO stage.  While it is being written its directory ends in ".partial".
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesa_ray.errors import CheckpointError
from nesa_ray.fields import Fields, read_json, write_json
from nesa_ray.runtime.checkpoint import shard_name, write_index

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands: steps done, and the data loader's state."""

    step: int
    data: Mapping[str, Any]


def moment_name(moment: str, parameter: str) -> str:
    """The name of an optimizer's moment in a checkpoint."""
    return f"optimizer/{moment}/{parameter}"


class Checkpoints:
    """The checkpoints in one run's output directory; keeps the newest `keep`."""

    def __init__(self, output: Path, *, keep: int = 2) -> None:
        self._root, self._keep = output / "checkpoints", keep
        self._writing: tuple[Path, int] | None = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(p for p in self._root.glob("step-*") if p.suffix != ".partial" and (p / STATE).is_file())
        return found[-1] if found else None

    @staticmethod
    def read(directory: Path) -> RunState:
        """The run's state in a checkpoint; raises CheckpointError."""
        known = Fields(read_json(directory / STATE, CheckpointError), str(directory / STATE), CheckpointError)
        return RunState(step=int(known.number("step")), data=dict(known.value.get("data", {})))

    def begin(self, step: int, stages: Sequence[int]) -> dict[int, str]:
        """The file each stage is to write; nothing else may be being written."""
        if self._writing is not None:
            raise CheckpointError(f"{self._writing[0]}: is still being written")
        directory = self._root / f"step-{step:08d}.partial"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._writing = (directory, step)
        return {s: str(directory / shard_name(i, len(stages))) for i, s in enumerate(stages)}

    @property
    def writing(self) -> bool:
        """Whether one has begun and isn't committed."""
        return self._writing is not None

    def commit(self, names: Mapping[str, Sequence[str]], data: Mapping[str, Any]) -> Path:
        """All files are written (path -> tensors in it): gives the checkpoint its name, forgets the oldest."""
        assert self._writing is not None
        partial, step = self._writing
        write_index(partial, {Path(file).name: tensors for file, tensors in names.items()})
        write_json(partial / STATE, {"step": step, "data": dict(data)})
        whole = partial.with_suffix("")
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        self._writing = None
        for old in sorted(p for p in self._root.glob("step-*") if p.suffix != ".partial")[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return whole
