import random

from nesa_ray.serving.blocks import Blocks


def test_a_common_start_is_shared_and_survives_release() -> None:
    blocks = Blocks(8, 4)
    text = list(range(11))
    table = blocks.allocate(3)
    assert table is not None
    blocks.publish(table, text, 0, 2)
    assert blocks.match(text) == table[:2]
    assert blocks.match(text[:8]) == table[:1]  # the last token is always computed, for its logits
    assert blocks.match([*text[:5], 99, 98, 97, 96]) == table[:1]
    assert blocks.match([99, *text]) == []
    blocks.release(table)
    assert blocks.free == 8
    assert blocks.match(text) == table[:2]


def test_adapters_share_no_blocks() -> None:
    blocks = Blocks(9, 4)
    text, tables = list(range(9)), {}
    for adapter in (0, 1, 2):
        assert blocks.match(text, adapter) == []
        tables[adapter] = blocks.allocate(3)
        assert tables[adapter] is not None
        blocks.publish(tables[adapter], text, 0, 2, adapter)
    assert {a: blocks.match(text, a) for a in tables} == {a: table[:2] for a, table in tables.items()}


def test_the_end_of_the_longest_unused_text_is_forgotten_first() -> None:
    blocks = Blocks(4, 2)
    first, second = [1, 2, 3, 4, 0], [5, 6, 7, 8, 0]
    for text in (first, second):
        table = blocks.allocate(2)
        assert table is not None
        blocks.publish(table, text, 0, 2)
        blocks.release(table)
    assert blocks.allocate(1) is not None
    assert len(blocks.match(first)) == 1
    assert len(blocks.match(second)) == 2
    assert blocks.allocate(4) is None


def test_blocks_are_never_lost_or_held_twice() -> None:
    rng = random.Random(3)
    blocks = Blocks(16, 2)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            blocks.release(held.pop(rng.randrange(len(held))))
        else:
            text = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
            known = blocks.match(text)
            more = blocks.needed(len(text)) - len(known)
            if blocks.free - blocks.idle(known) >= more:
                blocks.hold(known)
                fresh = blocks.allocate(more)
                assert fresh is not None
                assert not set(fresh) & {b for t in held for b in t}
                blocks.publish([*known, *fresh], text, len(known), len(text) // 2)
                held.append([*known, *fresh])
        assert blocks.free == 16 - len({b for t in held for b in t})
    for table in held:
        blocks.release(table)
    assert blocks.free == 16
