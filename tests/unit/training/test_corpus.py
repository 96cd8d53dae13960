"""The corpus on a small tree of source files: its split, its tokenizer, its tokens, and what is made again when."""

import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nesa_ray.errors import InvalidConfig
from nesa_ray.training.corpus import Corpus, make_corpus, token_ids, tokenize_parquet, unigram_entropy_nats
from nesa_ray.training.data import DataConfig, PackedWindows, evaluation_batches

SETTINGS = {"vocab_size": 400, "held_out_fraction": 0.3, "show_progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("lib")
    for directory in ("pkg", "pkg/test", "site-packages/other"):
        (root / directory).mkdir(parents=True)
        for i in range(20):
            lines = [f"def function_{i}_{j}(value):\n    return value + {i * j}\n" for j in range(30)]
            (root / directory / f"m{i}.py").write_text("\n".join(lines))
    (root / "empty.py").write_text("")
    (root / "pkg" / "latin.py").write_bytes(b"# coding: latin-1\nname = 'caf\xe9'\n")
    (root / "pkg" / "broken.py").write_bytes(b"name = '\xff\xfe'\n")
    return root


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), source=source, **SETTINGS)


def files_under(directory):
    return {p.relative_to(directory): p for p in directory.rglob("*") if p.is_file()}


def test_the_split_is_by_file_and_leaves_out_what_it_should(corpus, source):
    train, held_out = (pq.read_table(p).to_pydict() for p in (corpus.train_text, corpus.held_out_text))
    assert list(train) == ["path", "text"]
    assert not set(train["path"]) & set(held_out["path"])
    assert set(train["path"]) | set(held_out["path"]) == {f"pkg/m{i}.py" for i in range(20)} | {"pkg/latin.py"}
    texts = dict(zip(train["path"] + held_out["path"], train["text"] + held_out["text"], strict=True))
    assert texts["pkg/m3.py"] == (source / "pkg/m3.py").read_text()
    assert "café" in texts["pkg/latin.py"]


def test_tests_are_taken_on_request_and_files_keep_their_side(corpus, source, tmp_path):
    larger = make_corpus(tmp_path, source=source, include_tests=True, **SETTINGS)
    paths = {p: set(pq.read_table(p)["path"].to_pylist()) for p in (larger.train_text, corpus.train_text)}
    assert "pkg/test/m0.py" in set.union(*paths.values(), pq.read_table(larger.held_out_text)["path"].to_pylist())
    assert paths[corpus.train_text] == {p for p in paths[larger.train_text] if "/test/" not in p}


def test_auto_tokenizer_loads_the_directory(corpus):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(corpus.tokenizer))
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert (len(loaded), loaded.eos_token_id) == token_ids(corpus.tokenizer) == (400, 2)
    text = "def function_1(value):\n\treturn  'café ☕'  \n"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.decode([1, *loaded.encode("x = 1"), 2], skip_special_tokens=True) == "x = 1"
    document = pq.read_table(corpus.train_text)["text"][0].as_py()
    assert pq.read_table(corpus.train_tokens)["input_ids"][0].as_py() == [1, *loaded.encode(document)]


def test_tokens_are_a_row_a_document_and_pack(corpus):
    for text, tokens in ((corpus.train_text, corpus.train_tokens), (corpus.held_out_text, corpus.held_out_tokens)):
        table = pq.read_table(tokens)
        assert table.schema.field("input_ids").type == pa.list_(pa.int32())
        assert table.num_rows == pq.read_table(text).num_rows
    config = DataConfig(paths=corpus.held_out_tokens, sequence_length=32, shuffle=False)
    first = next(evaluation_batches(PackedWindows(config, vocab_size=400, eos_token_id=2), batch_size=1))
    assert first.input_ids_BT[0, 0] == 1
    assert first.input_ids_BT.shape == first.labels_BT.shape == (1, 32)


def test_two_runs_make_the_same_bytes_and_a_second_makes_nothing(corpus, source, tmp_path):
    first = corpus.tokenizer.parent
    make_corpus(tmp_path, source=source, **SETTINGS)
    made = files_under(tmp_path)
    assert made.keys() == files_under(first).keys()
    assert not [p for p in made if p.name.endswith(".partial")]
    for name, path in made.items():
        if path.suffix != ".inputs":
            assert path.read_bytes() == (first / name).read_bytes(), name
    times = {p: p.stat().st_mtime_ns for p in made.values()}
    make_corpus(tmp_path, source=source, **SETTINGS)
    assert {p: p.stat().st_mtime_ns for p in files_under(tmp_path).values()} == times


def test_only_what_depends_on_a_change_is_made_again(source, tmp_path):
    corpus = make_corpus(tmp_path, source=source, **SETTINGS)
    text_time = corpus.train_text.stat().st_mtime_ns
    make_corpus(tmp_path, source=source, **{**SETTINGS, "vocab_size": 350})
    assert token_ids(corpus.tokenizer)[0] == 350
    assert max(max(row) for row in pq.read_table(corpus.train_tokens)["input_ids"].to_pylist()) < 350
    assert corpus.train_text.stat().st_mtime_ns == text_time
    os.utime(source / "pkg" / "m0.py", ns=(1, 1))
    make_corpus(tmp_path, source=source, **{**SETTINGS, "vocab_size": 350})
    assert corpus.train_text.stat().st_mtime_ns > text_time


def test_a_run_cut_short_leaves_nothing_that_a_later_one_takes_for_whole(source, tmp_path, monkeypatch):
    def cut(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("nesa_ray.training.corpus.pq.ParquetWriter.write_table", cut)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path, source=source, **SETTINGS)
    corpus = Corpus.at(tmp_path)
    assert not corpus.train_text.exists()
    assert not corpus.train_tokens.exists()
    monkeypatch.undo()
    make_corpus(tmp_path, source=source, **SETTINGS)
    assert corpus.held_out_tokens.exists()


def test_unigram_entropy_is_its_formula(tmp_path):
    for name, rows in (("train", [[3, 3, 4], [3]]), ("held_out", [[4, 5]])):
        pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / f"{name}.parquet")
    got = unigram_entropy_nats(tmp_path / "held_out.parquet", tmp_path / "train.parquet", vocab_size=6, eos_token_id=2)
    # train: 3 thrice, 4 once, <eos> twice, of 6; held out: 4, 5, <eos>.
    assert got == pytest.approx(-np.mean([math.log(n / 12) for n in (2, 1, 3)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, r"corpus.vocab_size: needs at least 259 .*, got 100"),
        ({"vocab_size": 100_000}, r"corpus.vocab_size: needs at most the \d+ tokens that .* gives, got 100000"),
        ({"held_out_fraction": 0.0}, r"corpus.held_out_fraction: needs a number between 0 and 1, got 0.0"),
        ({"held_out_fraction": 1e-9}, r"corpus.source: needs Python files on both sides .* has none for held_out"),
    ],
)
def test_settings_that_cannot_be_are_refused(source, tmp_path, change, message):
    with pytest.raises(InvalidConfig, match=message):
        make_corpus(tmp_path, source=source, **{**SETTINGS, **change})
    assert not Corpus.at(tmp_path).train_tokens.exists()


def test_the_standard_library_itself(tmp_path):
    """Its files are found and split; the whole of it is tokenized by the demo, not here."""
    with pytest.raises(InvalidConfig, match="vocab_size"):
        make_corpus(tmp_path, vocab_size=1, show_progress=False)
    corpus = Corpus.at(tmp_path)
    paths = [pq.read_table(p)["path"].to_pylist() for p in (corpus.train_text, corpus.held_out_text)]
    assert "json/decoder.py" in paths[0] + paths[1]
    assert len(paths[0]) > 10 * len(paths[1]) > 100
    assert not any("site-packages" in p or "/test/" in p for p in paths[0])


def test_any_text_parquet_can_be_tokenized(corpus, tmp_path):
    pq.write_table(pa.table({"text": ["x = 1", "", "y = 2"]}), tmp_path / "text.parquet")
    tokenize_parquet(tmp_path / "text.parquet", corpus.tokenizer, tmp_path / "out.parquet", show_progress=False)
    rows = pq.read_table(tmp_path / "out.parquet")["input_ids"].to_pylist()
    assert rows[1] == [1]
    assert len(rows) == 3
