"""Parquet and Arrow files of tokens, read as one long stream.

Every row is a document.  The stream is the documents in the order of the files and rows, each followed by the
end-of-sequence token; an empty or null row is a document of no tokens.  A *block* is the unit of reading: a row group
of a Parquet file, a record batch of an Arrow one.  Only a block's token count is held in memory.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from nesa_ray.errors import InvalidConfig

_DOCUMENTS_PER_READ = 256
_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, directories and globs name, each once, sorted within a pattern.

    Raises InvalidConfig for a pattern that matches nothing.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not matches:
            raise InvalidConfig(f"data.paths: needs Parquet or Arrow files, none matches {pattern!r}")
        files.update(dict.fromkeys(matches))
    return list(files)


@dataclass(frozen=True, slots=True)
class _Block:
    """One row group or record batch: its file, its place there, its tokens including the end-of-sequence ones."""

    path: Path
    index: int
    n_tokens: int


class TokenFiles:
    """The stream of tokens over some files, with random access.

    `ends` [blocks] int64: the stream position after each block; its last entry is the stream's length.
    """

    def __init__(self, files: Sequence[Path], column: str, *, vocab_size: int, eos_token_id: int | None) -> None:
        """Counts the tokens of each block; reads Parquet written by Arrow by its statistics alone.

        `eos_token_id` None adds nothing: the documents then hold their own separators.

        Raises InvalidConfig for a file that isn't Parquet or Arrow, a missing column or one that isn't lists of
        integers, a file without tokens, and a token id outside of [0, vocab_size).
        """
        if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
            raise InvalidConfig(f"eos_token_id: needs an id in [0, vocab_size = {vocab_size}), got {eos_token_id}")
        self.column, self.vocab_size, self.eos_token_id = column, vocab_size, eos_token_id
        self._blocks: list[_Block] = []
        for path in files:
            blocks = self._index(path)
            if not sum(b.n_tokens for b in blocks):
                raise InvalidConfig(f"data.paths: every file needs tokens, {path} is empty")
            self._blocks += [b for b in blocks if b.n_tokens]
        self.ends = np.cumsum([b.n_tokens for b in self._blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The stream's tokens [start, stop), int32 [stop - start]; decodes the blocks that hold them, and no others.

        Raises InvalidConfig where a file no longer holds what it held when it was indexed.
        """
        tokens: np.ndarray = np.empty(stop - start, dtype=np.int32)
        filled = 0
        at_block = int(np.searchsorted(self.ends, start, side="right"))
        while filled < len(tokens):
            block = self._blocks[at_block]
            position = int(self.ends[at_block]) - block.n_tokens
            for piece in self._pieces(block.path, block.index):
                wanted = piece[max(start + filled - position, 0) : stop - position]
                tokens[filled : filled + len(wanted)] = wanted
                filled += len(wanted)
                position += len(piece)
                if position >= stop:
                    break
            else:
                if position != self.ends[at_block]:
                    found = block.n_tokens + position - int(self.ends[at_block])
                    raise InvalidConfig(
                        f"data.paths: block {block.index} of {block.path} needs its {block.n_tokens} indexed tokens, "
                        f"has {found}: the file changed, or its statistics are wrong"
                    )
            at_block += 1
        return tokens

    def _index(self, path: Path) -> list[_Block]:
        try:
            with path.open("rb") as file:
                magic = file.read(6)
            if magic.startswith(b"PAR1"):
                return self._index_parquet(path)
            return self._index_arrow(path)
        except (OSError, pa.ArrowException) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise InvalidConfig(f"data.paths: {path} can't be read as Parquet or Arrow: {reason}") from None

    def _index_parquet(self, path: Path) -> list[_Block]:
        with pq.ParquetFile(path) as file:
            self._check_type(path, file.schema_arrow)
            metadata = file.metadata
        # Other writers leave empty lists out of null_count, so that elements can't be told from them.
        trusted = str(metadata.created_by).startswith("parquet-cpp-arrow")
        blocks = []
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = (group.column(c) for c in range(group.num_columns))
            leaf = next(c for c in columns if c.path_in_schema.startswith(f"{self.column}."))
            statistics = leaf.statistics if trusted and leaf.is_stats_set else None
            if statistics is not None and statistics.has_null_count and statistics.has_min_max:
                self._check_range(path, statistics.min, statistics.max)
                n_tokens = statistics.num_values + (group.num_rows if self.eos_token_id is not None else 0)
            else:
                n_tokens = sum(len(piece) for piece in self._pieces(path, index))
            blocks.append(_Block(path, index, n_tokens))
        return blocks

    def _index_arrow(self, path: Path) -> list[_Block]:
        with pa.memory_map(str(path)) as mapped:
            schema, batches = _open_arrow(mapped)
            self._check_type(path, schema)
            counts = [len(self._tokens(path, batch.column(self.column))) for batch in batches]
        return [_Block(path, index, n_tokens) for index, n_tokens in enumerate(counts)]

    def _check_type(self, path: Path, schema: pa.Schema) -> None:
        if self.column not in schema.names:
            raise InvalidConfig(f"data.column: needs a column {self.column!r}, {path} has {', '.join(schema.names)}")
        kind = schema.field(self.column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise InvalidConfig(f"data.column: {self.column!r} needs lists of integers, {path} has {kind}")

    def _check_range(self, path: Path, smallest: int, largest: int) -> None:
        if smallest < 0 or largest >= self.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise InvalidConfig(
                f"data.column: {self.column!r} needs token ids in [0, vocab_size = {self.vocab_size}), "
                f"{path} has {wrong}"
            )

    def _pieces(self, path: Path, index: int) -> Iterator[np.ndarray]:
        """A block's tokens in order, some documents at a time, int32 [tokens]."""
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(_DOCUMENTS_PER_READ, row_groups=[index], columns=[self.column]):
                    yield self._tokens(path, batch.column(self.column))
        else:
            with pa.memory_map(str(path)) as mapped:
                _, batches = _open_arrow(mapped, first=index)
                yield self._tokens(path, next(batches).column(self.column))

    def _tokens(self, path: Path, documents: pa.Array) -> np.ndarray:
        values = pc.list_flatten(documents)
        if values.null_count:
            raise InvalidConfig(f"data.column: {self.column!r} needs token ids, {path} has nulls within its lists")
        ids: np.ndarray = values.to_numpy()
        if len(ids):
            self._check_range(path, int(ids.min()), int(ids.max()))
        tokens: np.ndarray = ids.astype(np.int32, copy=False)
        if self.eos_token_id is None:
            return tokens
        lengths = pc.fill_null(pc.list_value_length(documents), 0).to_numpy()
        return np.insert(tokens, np.cumsum(lengths, dtype=np.int64), self.eos_token_id)


def _open_arrow(mapped: pa.MemoryMappedFile, first: int = 0) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema, and the record batches from the `first`: views of the mapped file, unless it is compressed."""
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if is_file:
        file = pa.ipc.open_file(mapped)
        return file.schema, (file.get_batch(i) for i in range(first, file.num_record_batches))
    stream = pa.ipc.open_stream(mapped)
    return stream.schema, itertools.islice(stream, first, None)
