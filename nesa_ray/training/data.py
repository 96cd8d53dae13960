"""Training data: token files packed into windows, shuffled, shared out among replicas, resumable to the sample.

Shapes: B windows of a micro-batch, T tokens of a window, N windows.

Packing.  Window i of the stream (see token_files.py) is its tokens [i*T, i*T + T]: T + 1 of them, of which the first
T are the inputs and the last T the labels.  The last label of a window is the first input of the next, so every token
of an epoch but the stream's first is a label exactly once, and nothing is padded or masked.  A label may lie across
the end of a document: the end-of-sequence token is predicted from the document's last token, the next document's
first token from the end-of-sequence token.  The fewer than T tokens left at the stream's end are in no window.

Order.  The samples of a run are numbered 0, 1, 2, ... without end: sample k is the window at place k mod N of epoch
k // N.  Each epoch has its own order, drawn from (seed, epoch): the blocks of the files are shuffled, then the windows
within a buffer of consecutive blocks.  Step s takes the samples [s*G, (s+1)*G), G the global batch, and replica r of n
the r-th nth of them; so the global batches don't depend on n, a batch may hold the end of one epoch and the start of
the next, and a run's whole state is the number of samples it has seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nesa_ray.errors import CheckpointError, InvalidConfig
from nesa_ray.training.token_files import TokenFiles, find_files


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which windows and order.

    paths                  Parquet or Arrow files, directories of them, or globs; one or several
    column                 the column of token ids, lists of integers, a row a document
    shuffle_buffer_tokens  about how many tokens are shuffled together, and held in memory (4 bytes each); the largest
                           row group when that is more
    """

    paths: tuple[str, ...]
    column: str = "input_ids"
    sequence_length: int = 128
    seed: int = 0
    shuffle: bool = True
    shuffle_buffer_tokens: int = 1 << 24

    def __post_init__(self) -> None:
        given: Any = self.paths
        paths = (given,) if isinstance(given, str | Path) else tuple(given or ())
        if not paths:
            raise InvalidConfig("data.paths: needs at least one path, got none")
        object.__setattr__(self, "paths", tuple(str(p) for p in paths))
        _at_least("data.sequence_length", self.sequence_length, 1)
        _at_least("data.seed", self.seed, 0)
        _at_least("data.shuffle_buffer_tokens", self.shuffle_buffer_tokens, 1)


class TokenBatch(NamedTuple):
    """Inputs and labels, int64 [B, T] each, contiguous: label t is the token that follows input t."""

    input_ids_BT: np.ndarray
    labels_BT: np.ndarray


class PackedWindows:
    """The windows of some token files in the order of every epoch; holds one shuffle buffer of them in memory.

    `n_windows` is those of one epoch.
    """

    def __init__(self, config: DataConfig, *, vocab_size: int, eos_token_id: int | None) -> None:
        """Indexes the files; `eos_token_id` is put after every document (None: the documents have their own).

        Raises InvalidConfig for files that can't be read so (see TokenFiles), or that don't fill one window.
        """
        self.config = config
        self.files = TokenFiles(
            find_files(config.paths), config.column, vocab_size=vocab_size, eos_token_id=eos_token_id
        )
        length = config.sequence_length
        self.n_windows = (len(self.files) - 1) // length
        if self.n_windows < 1:
            raise InvalidConfig(
                f"data.paths: one window needs sequence_length + 1 = {length + 1} tokens, there are {len(self.files)}"
            )
        ends = np.minimum(-(-self.files.ends // length), self.n_windows)
        # Windows by the block of their first token: block b has [first, first + count).
        self._firsts = np.concatenate([[0], ends[:-1]])
        self._counts = ends - self._firsts
        self._loaded: tuple[int, int, int] | None = None
        self._windows_NT: np.ndarray = np.empty((0, length + 1), dtype=np.int32)

    def take(self, first: int, count: int) -> np.ndarray:
        """The samples [first, first + count) of the endless order: int32 [count, T + 1]."""
        out_NT: np.ndarray = np.empty((count, self.config.sequence_length + 1), dtype=np.int32)
        filled = 0
        while filled < count:
            epoch, place = divmod(first + filled, self.n_windows)
            start, stop = self._load(epoch, place)
            n = min(stop - place, count - filled)
            out_NT[filled : filled + n] = self._windows_NT[place - start : place - start + n]
            filled += n
        return out_NT

    def order(self) -> dict[str, Any]:
        """What the order of the samples depends on, as JSON."""
        config = self.config
        return {
            "tokens": len(self.files),
            "blocks_sha256": hashlib.sha256(self.files.ends.astype("<i8").tobytes()).hexdigest(),
            "sequence_length": config.sequence_length,
            "shuffle": config.shuffle,
            "seed": config.seed,
            "shuffle_buffer_tokens": config.shuffle_buffer_tokens,
        }

    def _load(self, epoch: int, place: int) -> tuple[int, int]:
        """Holds the buffer that has the place in the epoch's order; the range of places that it has."""
        if self._loaded is not None:
            loaded_epoch, start, stop = self._loaded
            if loaded_epoch == epoch and start <= place < stop:
                return start, stop
        config = self.config
        blocks = np.arange(len(self._counts))
        if config.shuffle:
            blocks = blocks[_permutation(len(blocks), config.seed, epoch, 0)]
        ends = np.cumsum(self._counts[blocks])
        # A buffer is the blocks that start within one stretch of so many places.
        windows_per_buffer = max(config.shuffle_buffer_tokens // config.sequence_length, 1)
        buffer_of = (ends - self._counts[blocks]) // windows_per_buffer
        buffer = buffer_of[np.searchsorted(ends, place, side="right")]
        held = blocks[buffer_of == buffer]
        stop = int(ends[buffer_of == buffer][-1])
        start = stop - int(self._counts[held].sum())

        self._loaded = None
        self._windows_NT = np.empty((stop - start, config.sequence_length + 1), dtype=np.int32)
        # The place of each window is drawn first and written to at once: a permuted copy would double the memory.
        places = np.arange(stop - start)
        if config.shuffle:
            places = _permutation(stop - start, config.seed, epoch, 1 + int(buffer))
        at = 0
        for first, count in zip(self._firsts[held].tolist(), self._counts[held].tolist(), strict=True):
            if count:
                self._windows_NT[places[at : at + count]] = self._read_windows(first, count)
                at += count
        self._loaded = (epoch, start, stop)
        return start, stop

    def _read_windows(self, first: int, count: int) -> np.ndarray:
        length = self.config.sequence_length
        tokens = self.files.read(first * length, (first + count) * length + 1)
        return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


class TrainBatches:
    """One replica's share of every step's global batch, from the first step or from where a state left off."""

    def __init__(
        self,
        windows: PackedWindows,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Sizes count windows.  All stages of a replica, and all replicas, get the same windows and sizes.

        Raises InvalidConfig when the global batch isn't whole micro-batches for every replica, or is more than an
        epoch has.
        """
        _at_least("global_batch_size", global_batch_size, 1)
        _at_least("micro_batch_size", micro_batch_size, 1)
        _at_least("replicas", replicas, 1)
        if not 0 <= replica < replicas:
            raise InvalidConfig(f"replica: needs a number in [0, replicas = {replicas}), got {replica}")
        if global_batch_size % (replicas * micro_batch_size):
            raise InvalidConfig(
                f"global_batch_size: needs a multiple of replicas x micro_batch_size = {replicas} x {micro_batch_size} "
                f"= {replicas * micro_batch_size}, got {global_batch_size}"
            )
        if windows.n_windows < global_batch_size:
            length = windows.config.sequence_length
            raise InvalidConfig(
                f"data.paths: a global batch of {global_batch_size} windows of {length} tokens needs "
                f"{global_batch_size * length + 1} tokens, there are {len(windows.files)}"
            )
        self.windows = windows
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.replica, self.replicas = replica, replicas
        self.samples_seen = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.samples_seen // self.windows.n_windows

    def next_step(self) -> list[TokenBatch]:
        """This replica's micro-batches of the next step, in order; moves on by one global batch."""
        share = self.global_batch_size // self.replicas
        windows_NT = self.windows.take(self.samples_seen + self.replica * share, share)
        self.samples_seen += self.global_batch_size
        return [_split(windows_NT[i : i + self.micro_batch_size]) for i in range(0, share, self.micro_batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON; the same on every replica."""
        return {"version": 1, "samples_seen": self.samples_seen, "order": self.windows.order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the samples that the state has seen, whatever the replicas and batch sizes were then.

        Raises CheckpointError when the state is of other data or another order: samples would be lost or repeated.
        """
        seen = state.get("samples_seen")
        if state.get("version") != 1 or not isinstance(seen, int) or isinstance(seen, bool) or seen < 0:
            raise CheckpointError(f"data state: needs version 1 and samples_seen ≥ 0, got {dict(state)}")
        saved = state.get("order") or {}
        for field, value in self.windows.order().items():
            if saved.get(field) != value:
                raise CheckpointError(f"data state: {field} needs to be as saved, {saved.get(field)}, is {value}")
        self.samples_seen = seen


def evaluation_batches(
    windows: PackedWindows, *, batch_size: int, max_windows: int | None = None, replica: int = 0, replicas: int = 1
) -> Iterator[TokenBatch]:
    """The windows once, in the files' order, `batch_size` at a time.

    With replicas, each gets a contiguous share; shares differ by one window at most, and the last batch of a share
    has as many windows as are left: weigh losses by tokens.  Raises InvalidConfig for windows that are shuffled, and
    for a share without windows.
    """
    _at_least("batch_size", batch_size, 1)
    if windows.config.shuffle:
        raise InvalidConfig("data.shuffle: evaluation reads the windows in the files' order, needs false, got true")
    total = windows.n_windows if max_windows is None else min(windows.n_windows, max_windows)
    start, stop = total * replica // replicas, total * (replica + 1) // replicas
    if start >= stop:
        raise InvalidConfig(f"data.paths: evaluation needs a window for each of {replicas} replicas, there are {total}")
    return (_split(windows.take(i, min(batch_size, stop - i))) for i in range(start, stop, batch_size))


def held_out_batches(
    paths: Sequence[str], sequence_length: int, *, batch_size: int, max_windows: int, vocab_size: int,
    eos_token_id: int | None,
) -> list[TokenBatch]:  # fmt: skip
    """The batches an evaluation is over: the files' first windows in order, as many as make whole batches.

    Raises InvalidConfig when they don't make one.
    """
    config = DataConfig(paths=tuple(paths), sequence_length=sequence_length, shuffle=False)
    windows = PackedWindows(config, vocab_size=vocab_size, eos_token_id=eos_token_id)
    count = min(max_windows, windows.n_windows) // batch_size * batch_size
    if not count:
        raise InvalidConfig(
            f"train: held_out: needs at least {batch_size} windows of {sequence_length} tokens, has {windows.n_windows}"
        )
    return list(evaluation_batches(windows, batch_size=batch_size, max_windows=count))


def _split(windows_NT: np.ndarray) -> TokenBatch:
    return TokenBatch(windows_NT[:, :-1].astype(np.int64), windows_NT[:, 1:].astype(np.int64))


def _permutation(n: int, *key: int) -> np.ndarray:
    """Of range(n), drawn from the key; raw bits and a stable sort, which no release of numpy may change."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def _at_least(field: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidConfig(f"{field}: needs a whole number ≥ {least}, got {value!r}")
