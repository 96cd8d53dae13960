"""Packing, order, sharding and resumption, each against the plain definition over the whole stream in memory."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray.errors import CheckpointError, InvalidConfig
from nesa_ray.training.data import DataConfig, PackedWindows, TrainBatches, evaluation_batches
from nesa_ray.training.token_files import TokenFiles, find_files

EOS = 1
VOCAB = 5000


def documents_of(n_documents, seed=0, longest=40):
    """Documents of increasing tokens, so that every window of the stream is different and shows where it is from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, n_documents)
    tokens = 2 + np.arange(lengths.sum()) % (VOCAB - 2)
    return [d.tolist() for d in np.split(tokens, np.cumsum(lengths)[:-1])]


def write(path, documents, rows=7, kind=None):
    table = pa.table({"input_ids": pa.array(documents, kind or pa.list_(pa.int32()))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    elif path.suffix == ".feather":
        pa.feather.write_feather(table, path, chunksize=rows, compression="lz4")
    else:
        new = pa.ipc.new_file if path.suffix == ".arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, rows)
    return path


def stream_of(documents):
    return np.array([t for d in documents for t in [*(d or []), EOS]])


def windows_of(path, **config):
    config = DataConfig(paths=path, **{"sequence_length": 8, **config})
    return PackedWindows(config, vocab_size=VOCAB, eos_token_id=EOS)


def loader(windows, replica=0, replicas=1, batch=8, micro=2):
    return TrainBatches(windows, global_batch_size=batch, micro_batch_size=micro, replica=replica, replicas=replicas)


def global_batch(loaders):
    """The inputs of one step over all replicas, in replica and micro-batch order: [G, T]."""
    return np.concatenate([batch.input_ids_BT for each in loaders for batch in each.next_step()])


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "tokens.parquet", documents_of(60))


@pytest.fixture(scope="module")
def windows(parquet):
    """Small buffers: several to an epoch, each of several row groups."""
    return windows_of(parquet, shuffle_buffer_tokens=300)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.stream", "t.feather"])
@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())], ids=str)
def test_the_stream_is_the_documents_each_followed_by_eos(tmp_path, name, kind):
    documents = [[], *documents_of(30), None, []]
    path = write(tmp_path / name, documents, kind=kind)
    files = TokenFiles([path, path], "input_ids", vocab_size=VOCAB, eos_token_id=EOS)
    expected = np.tile(stream_of(documents), 2)
    assert len(files) == len(expected)
    assert np.array_equal(files.read(0, len(files)), expected)
    for start, stop in [(0, 1), (3, 3), (5, 400), (len(expected) - 300, len(expected))]:
        assert np.array_equal(files.read(start, stop), expected[start:stop])


def test_without_eos_the_documents_are_joined_as_they_are(tmp_path):
    documents = documents_of(30)
    for name in ("t.parquet", "t.arrow"):
        path = write(tmp_path / name, documents)
        files = TokenFiles([path], "input_ids", vocab_size=VOCAB, eos_token_id=None)
        assert np.array_equal(files.read(0, len(files)), [t for d in documents for t in d])


def test_a_parquet_file_without_statistics_is_counted_by_reading(tmp_path):
    documents = documents_of(30)
    table = pa.table({"input_ids": pa.array(documents, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7, write_statistics=False)
    files = TokenFiles([tmp_path / "t.parquet"], "input_ids", vocab_size=VOCAB, eos_token_id=EOS)
    assert np.array_equal(files.read(0, len(files)), stream_of(documents))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=3, max_size=30),
    rows=st.integers(1, 9),
    length=st.integers(1, 40),
    buffer_tokens=st.integers(1, 400),
    shuffle=st.booleans(),
)
def test_an_epoch_has_every_window_once(tmp_path_factory, lengths, rows, length, buffer_tokens, shuffle):
    documents = [[2 + (i * 37 + j) % 900 for j in range(n)] for i, n in enumerate(lengths)]
    stream = stream_of(documents)
    path = write(tmp_path_factory.mktemp("p") / "t.parquet", documents, rows)
    n = (len(stream) - 1) // length
    if n < 1:
        with pytest.raises(InvalidConfig, match="sequence_length"):
            windows_of(path, sequence_length=length)
        return
    packed = windows_of(path, sequence_length=length, shuffle_buffer_tokens=buffer_tokens, shuffle=shuffle)
    expected = np.stack([stream[i * length : i * length + length + 1] for i in range(n)])
    assert packed.n_windows == n
    for epoch in (0, 3):
        got = packed.take(epoch * n, n)
        if not shuffle:
            assert np.array_equal(got, expected)
        assert sorted(got.tolist()) == sorted(expected.tolist())


def test_labels_are_the_inputs_shifted_and_meet_at_the_boundary(parquet):
    batches = list(evaluation_batches(windows_of(parquet, shuffle=False), batch_size=4))
    stream = stream_of(documents_of(60))
    inputs = np.concatenate([b.input_ids_BT for b in batches])
    labels = np.concatenate([b.labels_BT for b in batches])
    assert inputs.dtype == labels.dtype == np.int64
    assert all(x.flags.c_contiguous for b in batches for x in b)
    assert np.array_equal(inputs.ravel(), stream[: inputs.size])
    assert np.array_equal(labels.ravel(), stream[1 : labels.size + 1])
    assert len(stream) - inputs.size <= 8


def test_epochs_and_seeds_differ_and_repeat(windows, parquet):
    n = windows.n_windows
    first, second = windows.take(0, n), windows.take(n, n)
    assert not np.array_equal(first, second)
    assert np.array_equal(windows.take(0, n), first)
    assert not np.array_equal(windows_of(parquet, shuffle_buffer_tokens=300, seed=7).take(0, n), first)
    again = windows_of(parquet, shuffle_buffer_tokens=300)
    assert np.array_equal(again.take(n // 2, n), np.concatenate([first, second])[n // 2 : n // 2 + n])


def test_one_buffer_shuffles_over_all_row_groups(parquet):
    packed = windows_of(parquet)
    in_order = windows_of(parquet, shuffle=False).take(0, packed.n_windows)
    place = {tuple(w): i for i, w in enumerate(in_order.tolist())}
    places = np.array([place[tuple(w)] for w in packed.take(0, packed.n_windows).tolist()])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.3
    assert np.abs(np.diff(places)).mean() > len(places) / 5


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_split_the_same_global_batches(windows, parquet, replicas):
    one = [loader(windows)]
    several = [loader(windows_of(parquet, shuffle_buffer_tokens=300), r, replicas) for r in range(replicas)]
    for _ in range(3 * windows.n_windows // 8):
        assert np.array_equal(global_batch(one), global_batch(several))


@settings(max_examples=30, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 9)), min_size=1, max_size=6))
def test_resumed_runs_see_each_sample_once_whatever_the_replicas(windows, runs):
    """Each run takes some steps on some replicas, ends, and hands on its state as JSON."""
    state = None
    seen = []
    for replicas, steps in runs:
        loaders = [loader(windows, r, replicas) for r in range(replicas)]
        for each in loaders:
            if state is not None:
                each.load_state_dict(json.loads(state))
        seen += [global_batch(loaders) for _ in range(steps)]
        states = {json.dumps(each.state_dict()) for each in loaders}
        assert len(states) == 1
        state = states.pop()
    total = 8 * sum(steps for _, steps in runs)
    assert np.array_equal(np.concatenate(seen), windows.take(0, total)[:, :-1])
    assert json.loads(state)["samples_seen"] == total


def test_a_batch_across_the_end_of_an_epoch_loses_nothing(windows):
    """The ragged last batch of an epoch is filled from the next: every window is seen once in each of two epochs."""
    n = windows.n_windows
    assert n % 8
    one = loader(windows)
    steps = -(-2 * n // 8)
    seen = np.concatenate([global_batch([one]) for _ in range(steps)])[: 2 * n]
    assert one.epoch == 2
    expected = sorted(windows.take(0, n)[:, :-1].tolist())
    assert sorted(seen[:n].tolist()) == sorted(seen[n:].tolist()) == expected


def test_a_step_is_micro_batches(windows):
    batches = loader(windows, replica=1, replicas=2, batch=12, micro=3).next_step()
    assert [b.input_ids_BT.shape for b in batches] == [(3, 8), (3, 8)]
    assert all(np.array_equal(b.input_ids_BT[:, 1:], b.labels_BT[:, :-1]) for b in batches)


def test_state_of_other_data_is_refused(windows, parquet, tmp_path):
    state = loader(windows).state_dict()
    with pytest.raises(CheckpointError, match="seed needs to be as saved, 0, is 5"):
        loader(windows_of(parquet, shuffle_buffer_tokens=300, seed=5)).load_state_dict(state)
    other = write(tmp_path / "other.parquet", documents_of(61))
    with pytest.raises(CheckpointError, match="tokens needs to be as saved"):
        loader(windows_of(other, shuffle_buffer_tokens=300)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="samples_seen"):
        loader(windows).load_state_dict({"version": 1, "samples_seen": -1})


def test_evaluation_shares_are_disjoint_and_complete(parquet):
    packed = windows_of(parquet, shuffle=False)
    shares = [
        batch.input_ids_BT
        for r in range(3)
        for batch in evaluation_batches(packed, batch_size=4, replica=r, replicas=3)
    ]
    assert np.array_equal(np.concatenate(shares), packed.take(0, packed.n_windows)[:, :-1])
    assert sum(len(b.labels_BT) for b in evaluation_batches(packed, batch_size=4, max_windows=6)) == 6
    with pytest.raises(InvalidConfig, match=r"data.paths: evaluation needs a window for each of 5 replicas"):
        evaluation_batches(packed, batch_size=4, max_windows=3, replica=0, replicas=5)
    with pytest.raises(InvalidConfig, match=r"data.shuffle"):
        evaluation_batches(windows_of(parquet), batch_size=4)


def test_paths_may_be_files_directories_and_globs(tmp_path):
    a, b = (write(tmp_path / f"{n}.parquet", documents_of(3)) for n in "ab")
    c = write(tmp_path / "c.arrow", documents_of(3))
    (tmp_path / "notes.txt").write_text("x")
    assert find_files([str(tmp_path)]) == find_files([f"{tmp_path}/*.parquet", str(c), str(a)]) == [a, b, c]
    assert DataConfig(paths=[a, str(b)]).paths == (str(a), str(b))
    with pytest.raises(InvalidConfig, match=r"data.paths: needs Parquet or Arrow files, none matches .*\.pq"):
        find_files([f"{tmp_path}/*.pq"])
    with pytest.raises(InvalidConfig, match="at least one path"):
        DataConfig(paths=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length: needs a whole number ≥ 1, got 0"),
        ({"sequence_length": "8"}, "data.sequence_length: needs a whole number ≥ 1, got '8'"),
        ({"seed": -1}, "data.seed: needs a whole number ≥ 0, got -1"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(InvalidConfig, match=message):
        replace(DataConfig(paths="x"), **change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 6, "micro": 2, "replicas": 2}, "global_batch_size: needs a multiple of .* = 2 x 2 = 4, got 6"),
        (
            {"batch": 100_000, "micro": 1},
            "data.paths: a global batch of 100000 windows of 8 tokens needs 800001 tokens",
        ),
        ({"batch": 4, "micro": 0}, "micro_batch_size: needs a whole number ≥ 1, got 0"),
        ({"replica": 2, "replicas": 2}, r"replica: needs a number in \[0, replicas = 2\), got 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(windows, sizes, message):
    with pytest.raises(InvalidConfig, match=message):
        loader(windows, **sizes)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    good = write(tmp_path / "good.parquet", documents_of(9))
    empty = write(tmp_path / "empty.parquet", [])
    with pytest.raises(InvalidConfig, match=r"every file needs tokens, .*empty.parquet is empty"):
        windows_of([good, empty])
    with pytest.raises(InvalidConfig, match=r"data.column: needs a column 'tokens', .* has input_ids"):
        windows_of(good, column="tokens")
    for kind, documents in [(pa.list_(pa.float32()), [[1.0]]), (pa.string(), ["x"])]:
        wrong = write(tmp_path / "wrong.parquet", documents, kind=kind)
        with pytest.raises(InvalidConfig, match=r"data.column: 'input_ids' needs lists of integers, .* has (list|str)"):
            windows_of(wrong)
    for name in ("big.parquet", "big.arrow"):
        big = write(tmp_path / name, [[2, VOCAB, 3] * 9])
        with pytest.raises(InvalidConfig, match=r"token ids in \[0, vocab_size = 5000\), .* has 5000"):
            windows_of(big)
    negative = write(tmp_path / "negative.parquet", [[2, -3] * 9])
    with pytest.raises(InvalidConfig, match="has -3"):
        windows_of(negative)
    text = tmp_path / "text.parquet"
    text.write_text("not Parquet at all")
    with pytest.raises(InvalidConfig, match=r"text.parquet can't be read as Parquet or Arrow"):
        windows_of(text)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    with pytest.raises(InvalidConfig, match=r"cut.parquet can't be read"):
        windows_of(cut)
    nulls = write(tmp_path / "nulls.arrow", [[2, None, 3] * 9])
    with pytest.raises(InvalidConfig, match="nulls within its lists"):
        windows_of(nulls)


def test_a_file_that_changes_under_the_reader_is_refused(tmp_path):
    path = write(tmp_path / "t.parquet", documents_of(60))
    packed = windows_of(path)
    write(path, documents_of(60, longest=20))
    with pytest.raises(InvalidConfig, match="the file changed"):
        packed.take(0, 1)
