from pathlib import Path

import pytest

from nesa_ray.cluster.cores import as_neighbours, part_of


@pytest.mark.parametrize(
    ("cores", "parts"),
    [
        ((), ((),)),
        ((0, 1), ((0, 1),)),
        ((0, 1), ((0,), (1,))),
        ((4, 5, 6), ((4,), (5, 6))),
        ((0, 1, 2, 3, 4), ((0,), (1, 2), (3, 4))),
        ((0, 1), ((0,), (0,), (1,))),  # more parts than cores: they are shared
        ((0, 1), ((0,), (0,), (1,), (1,))),
        ((7,), ((7,), (7,), (7,))),
    ],
)
def test_parts(cores: tuple[int, ...], parts: tuple[tuple[int, ...], ...]) -> None:
    assert tuple(part_of(cores, i, len(parts)) for i in range(len(parts))) == parts


def test_every_core_is_in_one_part_and_parts_are_alike() -> None:
    for count in range(1, 20):
        for n in range(1, count + 1):
            parts = [part_of(range(count), i, n) for i in range(n)]
            assert [c for p in parts for c in p] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_threads_of_a_core_and_cores_of_a_socket_are_neighbours(tmp_path: Path) -> None:
    for core in range(8):  # two sockets of two cores of two threads, numbered as Linux often does
        described = tmp_path / f"cpu{core}" / "topology"
        described.mkdir(parents=True)
        (described / "physical_package_id").write_text(f"{core % 4 // 2}\n")
        (described / "core_id").write_text(f"{core % 2}\n")
    assert as_neighbours(range(8), tmp_path) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert as_neighbours([3, 1, 2], tmp_path / "nowhere") == [1, 2, 3]
