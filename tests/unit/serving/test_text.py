import random
from pathlib import Path

import pytest

from nesa_ray.serving.text import TextStream, load_tokenizer
from tests.unit.serving.conftest import byte_tokenizer


def run(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, stop)
    ids = tokenizer.encode(text)
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(stream.push(token, last=i == len(ids) - 1))
        if stream.stopped_by is not None:
            break
    return pieces, stream.stopped_by


def test_half_characters_are_held_back() -> None:
    pieces, _ = run("aé漢🙂b")
    assert "".join(pieces) == "aé漢🙂b"
    assert not any("�" in p for p in pieces)


def test_an_unfinished_character_at_the_end_comes_out_as_it_is() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a漢")[:-1]
    assert "".join(stream.push(t, last=t is ids[-1]) for t in ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "out", "by"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("tw", "two"), "one ", "tw"),
        ("one twx", ("two",), "one twx", None),
        ("ends with tw", ("two",), "ends with tw", None),
        ("aaab", ("aab",), "a", "aab"),
    ],
)
def test_stop_texts_end_the_output_and_arent_in_it(text: str, stop: tuple[str, ...], out: str, by: str | None) -> None:
    pieces, stopped = run(text, stop)
    assert ("".join(pieces), stopped) == (out, by)


def test_no_piece_ever_shows_the_start_of_a_stop_text() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice("ab") for _ in range(12))
        stop = "".join(rng.choice("ab") for _ in range(3))
        pieces, by = run(text, (stop,))
        at = text.find(stop)
        assert "".join(pieces) == (text if at < 0 else text[:at])
        assert (by is None) == (at < 0)


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is not None
