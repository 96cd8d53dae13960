"""A real corpus from the machine at hand: Python's own standard library, split by file, tokenized.

    source files ─▶ text/{train,held_out}.parquet ─▶ tokenizer/ (of train) ─▶ tokens/{train,held_out}.parquet

Each step writes beside its output and renames, and leaves a digest of what it was made from in `NAME.inputs`: a step
whose output and inputs are unchanged is skipped.  The outputs depend on the source files and the settings only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tokenizers
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import write_json

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
_SPECIAL_TOKENS = (PAD, BOS, EOS)
_SMALLEST_VOCABULARY = len(_SPECIAL_TOKENS) + 256
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_INSTALLED_DIRECTORIES = {"site-packages", "dist-packages"}
_TEXTS_PER_BATCH = 32
_TOKENS_PER_ROW_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where a corpus lies: texts (columns path, text), tokens (column input_ids), and the tokenizer's directory."""

    train_text: Path
    held_out_text: Path
    tokenizer: Path
    train_tokens: Path
    held_out_tokens: Path

    @classmethod
    def at(cls, directory: str | Path) -> Corpus:
        """The layout under a directory; nothing is read or written."""
        root = Path(directory)
        return cls(
            train_text=root / "text" / "train.parquet",
            held_out_text=root / "text" / "held_out.parquet",
            tokenizer=root / "tokenizer",
            train_tokens=root / "tokens" / "train.parquet",
            held_out_tokens=root / "tokens" / "held_out.parquet",
        )


def make_corpus(
    directory: str | Path,
    *,
    vocab_size: int = 4096,
    held_out_fraction: float = 0.05,
    include_tests: bool = False,
    source: str | Path | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Makes what of the corpus isn't there yet; `source` is the standard library unless given.

    Raises InvalidConfig for settings out of range, and for a source without files for both splits.
    """
    corpus = Corpus.at(directory)
    root = Path(sysconfig.get_paths()["stdlib"] if source is None else source)
    write_texts(
        root,
        corpus.train_text,
        corpus.held_out_text,
        held_out_fraction=held_out_fraction,
        include_tests=include_tests,
        show_progress=show_progress,
    )
    train_tokenizer(corpus.train_text, corpus.tokenizer, vocab_size=vocab_size, show_progress=show_progress)
    for text, tokens in ((corpus.train_text, corpus.train_tokens), (corpus.held_out_text, corpus.held_out_tokens)):
        tokenize_parquet(text, corpus.tokenizer, tokens, show_progress=show_progress)
    return corpus


def write_texts(
    root: Path,
    train: Path,
    held_out: Path,
    *,
    held_out_fraction: float,
    include_tests: bool = False,
    show_progress: bool = True,
) -> None:
    """Writes the Python files under `root` to two Parquet files, columns path (relative to root) and text.

    A file is held out when the hash of its path, as a number in [0, 1), is below the fraction, so that it stays on
    its side when others come and go.  Files that are empty or not in their declared encoding are left out.
    Raises InvalidConfig when either side would be empty.
    """
    if not 0 < held_out_fraction < 1:
        raise InvalidConfig(f"corpus.held_out_fraction: needs a number between 0 and 1, got {held_out_fraction}")
    excluded = _INSTALLED_DIRECTORIES | (set() if include_tests else _TEST_DIRECTORIES)
    names = sorted(_python_files(root, excluded))
    sides = {held_out: [n for n in names if _fraction(n) < held_out_fraction]}
    sides[train] = [n for n in names if _fraction(n) >= held_out_fraction]

    def build() -> None:
        for output, side in sides.items():
            texts = {name: _read_source(root / name) for name in _track(side, f"reading {output.stem}", show_progress)}
            texts = {name: text for name, text in texts.items() if text}
            if not texts:
                raise InvalidConfig(
                    f"corpus.source: needs Python files on both sides of the split, {root} has none for {output.stem}"
                )
            table = pa.table({"path": list(texts), "text": list(texts.values())})
            partial = _partial(output)
            pq.write_table(table, partial, compression="zstd", row_group_size=_TEXTS_PER_BATCH)
            partial.replace(output)

    _make([train, held_out], build, files=[root / n for n in names], root=str(root), fraction=held_out_fraction)


def train_tokenizer(text: Path, output: Path, *, vocab_size: int = 4096, show_progress: bool = True) -> None:
    """Trains a byte-level BPE on a text Parquet; writes a directory that transformers.AutoTokenizer loads.

    Ids 0, 1, 2 are <pad>, <bos>, <eos>; encoding adds none of them by itself.
    Raises InvalidConfig for a vocabulary smaller than the bytes and the special tokens, or larger than the text gives.
    """
    if not isinstance(vocab_size, int) or vocab_size < _SMALLEST_VOCABULARY:
        raise InvalidConfig(
            f"corpus.vocab_size: needs at least {_SMALLEST_VOCABULARY} (256 bytes and {len(_SPECIAL_TOKENS)} special "
            f"tokens), got {vocab_size}"
        )

    def build() -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (batch.column("text").to_pylist() for batch in _batches(text, "training the tokenizer", show_progress))
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab_size()
        if found != vocab_size:
            raise InvalidConfig(
                f"corpus.vocab_size: needs at most the {found} tokens that {text} gives, got {vocab_size}"
            )
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        partial = _partial(output)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", {**settings, **special})
        write_json(partial / "special_tokens_map.json", special)
        shutil.rmtree(output, ignore_errors=True)
        partial.replace(output)

    _make([output], build, files=[text], vocab_size=vocab_size, version=tokenizers.__version__)


def tokenize_parquet(text: Path, tokenizer: Path, output: Path, *, show_progress: bool = True) -> None:
    """Writes the tokens of a text Parquet: column input_ids (list<int32>), a row a document, <bos> first in each.

    Streams record batches; the end of a document is left to the reader (see training/data.py).
    """

    def build() -> None:
        model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        bos = _special_id(model, BOS)
        schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
        partial = _partial(output)
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            rows: list[list[int]] = []
            n_tokens = 0
            for batch in _batches(text, f"tokenizing {text.stem}", show_progress):
                encoded = model.encode_batch_fast(batch.column("text").to_pylist(), add_special_tokens=False)
                rows += [[bos, *each.ids] for each in encoded]
                n_tokens += sum(len(each.ids) + 1 for each in encoded)
                if n_tokens >= _TOKENS_PER_ROW_GROUP:
                    writer.write_table(pa.table([rows], schema=schema))
                    rows, n_tokens = [], 0
            if rows:
                writer.write_table(pa.table([rows], schema=schema))
        partial.replace(output)

    _make([output], build, files=[text, tokenizer / "tokenizer.json"], version=tokenizers.__version__)


def token_ids(tokenizer: Path) -> tuple[int, int]:
    """The vocabulary's size and the id of <eos>, of a tokenizer directory made here; raises InvalidConfig."""
    model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return model.get_vocab_size(), _special_id(model, EOS)


def _special_id(model: Tokenizer, token: str) -> int:
    found = model.token_to_id(token)
    if found is None:
        raise InvalidConfig(f"corpus.tokenizer: needs the special token {token}, has none")
    return found


def unigram_entropy_nats(held_out_tokens: Path, train_tokens: Path, *, vocab_size: int, eos_token_id: int) -> float:
    """The loss of a model that knows only how often each token occurs, in nats per token.

    The cross-entropy of the held-out tokens under train's unigram distribution with add-one smoothing:
    mean over held-out tokens t of -ln((n_train(t) + 1) / (N_train + vocab_size)).  One end-of-sequence token a
    document is counted on both sides, as the packed windows have them.
    """
    train = _counts(train_tokens, vocab_size, eos_token_id)
    held_out = _counts(held_out_tokens, vocab_size, eos_token_id)
    nats = math.log(train.sum() + vocab_size) - np.log(train + 1)
    return float((held_out * nats).sum() / held_out.sum())


def _counts(tokens: Path, vocab_size: int, eos_token_id: int) -> np.ndarray:
    counts: np.ndarray = np.zeros(vocab_size, dtype=np.int64)
    with pq.ParquetFile(tokens) as file:
        for batch in file.iter_batches(columns=["input_ids"]):
            ids = pc.list_flatten(batch.column("input_ids")).to_numpy()
            counts += np.bincount(ids, minlength=vocab_size)
            counts[eos_token_id] += batch.num_rows
    return counts


def _make(outputs: list[Path], build: Callable[[], None], *, files: list[Path], **settings: Any) -> None:
    """Runs `build` unless the outputs are there and were made from these files (by size and time) and settings."""
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    digest = hashlib.sha256(json.dumps([state, settings], sort_keys=True).encode()).hexdigest()
    stamp = outputs[0].with_name(f"{outputs[0].name}.inputs")
    if all(o.exists() for o in outputs) and stamp.exists() and stamp.read_text().strip() == digest:
        return
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    build()
    partial = _partial(stamp)
    partial.write_text(digest + "\n")
    partial.replace(stamp)


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _python_files(root: Path, excluded: set[str]) -> Iterator[str]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in excluded]
        yield from ((Path(directory) / name).relative_to(root).as_posix() for name in files if name.endswith(".py"))


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read_source(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _batches(text: Path, description: str, show_progress: bool) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(text) as file:
        groups = _track(range(file.num_row_groups), description, show_progress)
        for group in groups:
            yield from file.iter_batches(_TEXTS_PER_BATCH, row_groups=[group], columns=["text"])


def _track(items: Iterable[Any], description: str, show_progress: bool) -> Iterable[Any]:
    return track(items, description, console=Console(stderr=True), disable=not show_progress)
