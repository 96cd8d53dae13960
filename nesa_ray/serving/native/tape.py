"""Kernel calls played again by one call, for any size of a step: what is between them in Python takes no time then.

A kernel's arguments are addresses, sizes and strides, all of the form  base + a + b · T + c · R  with T the tokens of a
step and R its rows whose results are wanted.  So recordings of three steps give a, b and c, and a fourth shows that
they are of that form; no instruction has to be understood.
Results get places in one piece of memory, which are used again once nothing later reads them.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.kernel import POINTER, Recording

RECORDINGS = 4
_MOST_WORDS = 64  # of a structure: see `play` in kernels.cpp
_NUMBER, _PLACES, _FIRST = 0, 1, 2  # bases: zero, the places' memory; and from then on what the caller gives
_ALIGNED = 64
Sizes = tuple[int, int]  # T and R of a step


class NotPlayable(Exception):
    """Something else than kernels computed, or an argument isn't of that form."""


@dataclass(frozen=True, slots=True)
class Affine:
    """at + per_token · T + per_row · R."""

    at: int
    per_token: int = 0
    per_row: int = 0

    def of(self, sizes: Sizes) -> int:
        """Its value for (T, R)."""
        return self.at + self.per_token * sizes[0] + self.per_row * sizes[1]

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.at + other.at, self.per_token + other.per_token, self.per_row + other.per_row)

    @classmethod
    def through(cls, points: Sequence[tuple[Sizes, int]]) -> Affine:
        """The one that has these values for these (T, R).  Raises NotPlayable."""
        ((t, r), v), *others = points
        (t1, r1, v1), (t2, r2, v2) = ((x - t, y - r, w - v) for (x, y), w in others[:2])
        area = t1 * r2 - t2 * r1
        if not area:
            raise NotPlayable(f"steps too much alike: {[of for of, _ in points]}")
        per_token, per_row = (v1 * r2 - v2 * r1) // area, (t1 * v2 - t2 * v1) // area
        made = cls(v - per_token * t - per_row * r, per_token, per_row)
        if any(made.of(sizes) != value for sizes, value in points):
            raise NotPlayable(f"a size isn't proportional to tokens or rows: {points}")
        return made


@dataclass(frozen=True)
class Run:
    """One recording: the step's sizes, the calls, what went in, and what came out."""

    sizes: Sizes
    recording: Recording
    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Word:
    """One of a call: a number, or an address so far into one of the results or inputs."""

    base: str
    which: int
    value: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tensor's sizes and strides, in elements."""

    dtype: torch.dtype
    sizes: tuple[Affine, ...]
    strides: tuple[Affine, ...]

    @classmethod
    def of(cls, seen: Sequence[tuple[Sizes, torch.Tensor]]) -> _Layout:
        """Of a tensor that has been seen in steps of these sizes.  Raises NotPlayable."""
        first = seen[0][1]
        if any(t.dim() != first.dim() for _, t in seen):
            raise NotPlayable("other dimensions for other sizes")
        return cls(
            first.dtype,
            tuple(Affine.through([(n, t.shape[d]) for n, t in seen]) for d in range(first.dim())),
            tuple(Affine.through([(n, t.stride(d)) for n, t in seen]) for d in range(first.dim())),
        )

    def fits(self, x: torch.Tensor, n: Sizes) -> bool:
        """Whether it is of these sizes and strides."""
        if x.dtype != self.dtype or x.dim() != len(self.sizes):
            return False
        of = zip(x.shape, x.stride(), self.sizes, self.strides, strict=True)
        return all(size == s.of(n) and (size == 1 or stride == t.of(n)) for size, stride, s, t in of)

    def within(self, places: torch.Tensor, at: Affine, n: Sizes) -> torch.Tensor:
        """It, where it begins so many bytes after the beginning of `places`."""
        sizes, strides = ([x.of(n) for x in of] for of in (self.sizes, self.strides))
        return places.view(self.dtype).as_strided(sizes, strides, at.of(n) // self.dtype.itemsize)


class Tape:
    """Plays what was recorded."""

    def __init__(self, runs: Sequence[Run], fixed: Sequence[torch.Tensor], step_fields: Sequence[str]) -> None:
        """`fixed` are the tensors, besides inputs and results, that calls may read.  Raises NotPlayable."""
        if len({r.sizes for r in runs}) < RECORDINGS:
            raise NotPlayable(f"needs {RECORDINGS} recordings of different sizes")
        resolved = [_resolve(r, fixed) for r in runs]
        calls = [[kernel.address for kernel, _ in r.recording.calls] for r in runs]
        if any(c != calls[0] for c in calls) or not calls[0]:
            raise NotPlayable("other calls for other sizes")
        places, self._n_bytes = _places(runs, resolved)
        self._words = array("q")
        steps = {name: _FIRST + i for i, name in enumerate(step_fields)}
        first_input = _FIRST + len(step_fields)
        for i, (kernel, _) in enumerate(runs[0].recording.calls):
            fields = type(kernel.arguments)._fields_
            if len(fields) > _MOST_WORDS:
                raise NotPlayable(f"{len(fields)} words")
            self._words.extend((calls[0][i], len(fields)))
            for j, (name, *_) in enumerate(fields):
                if name in kernel.step_fields:
                    self._words.extend((steps[name], 0, 0, 0))
                    continue
                seen = [r[i][j] for r in resolved]
                value = _affine(runs, seen, places)
                base = {"number": _NUMBER, "made": _PLACES, "input": first_input + seen[0].which}[seen[0].base]
                self._words.extend((base, value.at, value.per_token, value.per_row))
        self._inputs = [_Layout.of([(r.sizes, r.inputs[i]) for r in runs]) for i in range(len(runs[0].inputs))]
        self._outputs = [
            (_Layout.of(seen), places[_made_by(runs, i)] + Affine.through([(n, _offset(t)) for n, t in seen]))
            for i in range(len(runs[0].outputs))
            for seen in [[(r.sizes, r.outputs[i]) for r in runs]]
        ]
        tape = (ctypes.c_int64 * len(self._words)).from_buffer(self._words)
        self._bases = (ctypes.c_int64 * (first_input + len(runs[0].inputs)))()
        play: Any = getattr(kernels(), "play")  # noqa: B009
        play.argtypes = (POINTER, ctypes.c_int64, POINTER, ctypes.c_int64, ctypes.c_int64)
        self._play = partial(play, tape, len(self._words), self._bases)

    def plays(self, inputs: Sequence[torch.Tensor], sizes: Sizes) -> bool:
        """Whether the inputs lie as those that were recorded."""
        return all(layout.fits(x, sizes) for layout, x in zip(self._inputs, inputs, strict=True))

    def play(
        self, inputs: Sequence[torch.Tensor], sizes: Sizes, step_fields: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """The outputs for these inputs."""
        places = torch.empty(self._n_bytes.of(sizes), dtype=torch.uint8)
        self._bases[:] = [0, places.data_ptr(), *step_fields, *(x.data_ptr() for x in inputs)]
        self._play(*sizes)
        return tuple(layout.within(places, at, sizes) for layout, at in self._outputs)


def _resolve(run: Run, fixed: Sequence[torch.Tensor]) -> list[list[_Word]]:
    """Each call's words, with what the pointers point into."""
    ranges = [
        (t.data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes(), base, i)
        for base, of in (("made", run.recording.made), ("input", run.inputs), ("number", fixed))
        for i, t in enumerate(of)
    ]
    return [
        [
            _address(w, ranges) if t is POINTER and w and name not in kernel.step_fields else _Word("number", 0, w)
            for w, (name, t, *_) in zip(words, type(kernel.arguments)._fields_, strict=True)
        ]
        for kernel, words in run.recording.calls
    ]


def _address(word: int, ranges: Sequence[tuple[int, int, str, int]]) -> _Word:
    into = [r for r in ranges if r[0] <= word < r[1]]
    if not into:
        raise NotPlayable("a kernel reads what no kernel made")
    begin, _, base, which = max(into, key=lambda r: r[0])  # inputs may be parts of each other
    return _Word(base, which, word) if base == "number" else _Word(base, which, word - begin)


def _affine(runs: Sequence[Run], seen: Sequence[_Word], places: Sequence[Affine]) -> Affine:
    """A word, from its base on."""
    if any((w.base, w.which) != (seen[0].base, seen[0].which) for w in seen):
        raise NotPlayable("other operands for other sizes")
    value = Affine.through([(r.sizes, w.value) for r, w in zip(runs, seen, strict=True)])
    if seen[0].base == "made":
        return places[seen[0].which] + value
    return value


def _places(runs: Sequence[Run], resolved: Sequence[list[list[_Word]]]) -> tuple[list[Affine], Affine]:
    """Where each result lies, in bytes, and how many there are in all."""
    if any(len(r.recording.made) != len(runs[0].recording.made) for r in runs):
        raise NotPlayable("other results for other sizes")
    last: dict[int, int] = {}
    for i, call in enumerate(resolved[0]):
        last.update({w.which: i for w in call if w.base == "made"})
    kept = {_made_by(runs, i) for i in range(len(runs[0].outputs))}
    places: list[Affine] = []
    free: dict[Affine, list[Affine]] = {}
    ends: dict[int, list[int]] = {}
    for which, i in last.items():
        if which not in kept:
            ends.setdefault(i, []).append(which)
    sizes = [
        Affine.through([(r.sizes, r.recording.made[i].nbytes) for r in runs])
        for i in range(len(runs[0].recording.made))
    ]
    at, end = 0, Affine(0)
    for which, size in enumerate(sizes):
        made_at = next((i for i, c in enumerate(resolved[0]) if _mentions(c, which)), len(resolved[0]))
        for i in range(at, made_at):  # what no later call reads gives its place away
            for gone in ends.get(i, ()):
                free.setdefault(sizes[gone], []).append(places[gone])
        at = max(at, made_at)
        if free.get(size):
            places.append(free[size].pop())
        else:
            places.append(end)
            end += Affine(_aligned(size.at), _aligned(size.per_token), _aligned(size.per_row))
    return places, end


def _mentions(call: Sequence[_Word], which: int) -> bool:
    return any((w.base, w.which) == ("made", which) for w in call)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNED) * _ALIGNED


def _made_by(runs: Sequence[Run], output: int) -> int:
    """Which of the results an output is, or a part of."""
    found = {i for r in runs for i, made in enumerate(r.recording.made) if _shared(made, r.outputs[output])}
    if len(found) != 1:
        raise NotPlayable("an output that no kernel made")
    return found.pop()


def _offset(x: torch.Tensor) -> int:
    """Bytes from the beginning of its memory."""
    return x.storage_offset() * x.itemsize


def _shared(made: torch.Tensor, output: Any) -> bool:
    storage = made.untyped_storage().data_ptr()
    return isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() == storage
