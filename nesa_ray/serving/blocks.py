"""Blocks of the paged key-value cache, by number: who holds which, and which start of a text is in which.

A block holds the keys and values of `size` consecutive tokens, in every stage at the same number; the tensors are the
stages' (kv_cache.py).  (Kwon et al., PagedAttention, arXiv 2309.06180.)

A full block is known by its tokens and by the block before it, a first one by its adapter's number (0: none), so a
sequence that starts like an earlier one of the same adapter takes the earlier one's blocks (prefix caching).  Matching
compares the tokens themselves, so texts never mix by a hash collision.
Stages compute steps in the order they were issued, so a block may be shared, and reused, while the step that writes it
is still under way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the content before the first block; with an adapter, less its number, which no block's content is
Key = tuple[int, tuple[int, ...]]  # content of the block before, and this block's tokens


class Blocks:
    """Allocates the blocks 0 … count - 1.  Not thread-safe: the engine's loop owns it."""

    def __init__(self, count: int, size: int, *, prefix_cache: bool = True) -> None:
        self.count, self.size = count, size
        self._prefix_cache = prefix_cache
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # next to be used first
        self._holders = [0] * count
        self._by_key: dict[Key, int] = {}
        self._key: dict[int, Key] = {}
        self._content: dict[int, int] = {}  # block -> a number that no other content ever had
        self._contents = ROOT

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int], adapter: int = 0) -> list[int]:
        """Blocks that hold the longest known start of `tokens`, short of the last token; to be passed to `hold`."""
        found: list[int] = []
        before = ROOT - adapter
        for start in range(0, len(tokens) - self.size, self.size):
            block = self._by_key.get((before, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            found.append(block)
            before = self._content[block]
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of the blocks count as free now."""
        return sum(not self._holders[b] for b in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a holder to each."""
        for b in blocks:
            self._holders[b] += 1
            self._free.pop(b, None)

    def allocate(self, count: int) -> list[int] | None:
        """Takes free blocks, forgetting what the longest unused ones hold; None when there aren't enough."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for b in taken:
            self._forget(b)
            self._holders[b] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Takes off a holder of each; what they hold stays known until the block is needed."""
        for b in reversed(blocks):  # a text's end is forgotten before its start
            self._holders[b] -= 1
            if not self._holders[b]:
                self._free[b] = None
                if b not in self._content:
                    self._free.move_to_end(b, last=False)

    def publish(self, table: Sequence[int], tokens: Sequence[int], already: int, full: int, adapter: int = 0) -> None:
        """Makes the blocks `already` … `full` - 1 of a sequence known by their tokens."""
        if not self._prefix_cache:
            return
        for i in range(already, full):
            if i and table[i - 1] not in self._content:
                return
            before = self._content[table[i - 1]] if i else ROOT - adapter
            key = (before, tuple(tokens[i * self.size : (i + 1) * self.size]))
            if key in self._by_key or table[i] in self._key:
                continue
            self._contents += 1
            self._by_key[key] = table[i]
            self._key[table[i]] = key
            self._content[table[i]] = self._contents

    def _forget(self, block: int) -> None:
        if block in self._key:
            del self._by_key[self._key.pop(block)], self._content[block]
