"""Tokens to text, as they come; and text that ends an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nesa_ray.errors import InvalidConfig

_UNFINISHED = "�"  # what a decoder puts for bytes that aren't a whole character yet


def load_tokenizer(directory: str | Path) -> Any | None:
    """The directory's tokenizer, or None where there is none.  Raises InvalidConfig when it can't be read."""
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((Path(directory) / f).is_file() for f in files):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:
        raise InvalidConfig(f"model: {directory}: its tokenizer can't be read: {str(e).splitlines()[0]}") from None


class TextStream:
    """The text of one output.  Holds back what may be half a character, or the beginning of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0  # ids from _context are decoded for spacing; those from _read are new
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that is certain after this token; everything when it is the last.  Sets `stopped_by`."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        if last or (len(text) > len(before) and not text.endswith(_UNFINISHED)):
            self._held += text[len(before) :]
            self._context, self._read = self._read, len(self._ids)
        found = [(self._held.find(s), s) for s in self._stop if s in self._held]
        if found:
            at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = 0 if last else max((_overlap(self._held, s) for s in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
