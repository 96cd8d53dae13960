import math
import socket
import time
from itertools import combinations

import pytest

from nesa_ray.cluster.measure import (
    LinkServer,
    _bandwidth,
    _steady_speed,
    flops_meter,
    level,
    measure_link,
    memory_meter,
)
from nesa_ray.cluster.probe import agree, link_share, tournament
from nesa_ray.cluster.topology import Device


def test_a_loopback_link_has_finite_speed_and_latency() -> None:
    server = LinkServer("127.0.0.1")
    try:
        link = measure_link(server.address, 0.2)
    finally:
        server.close()
    assert 1e6 < link.bytes_per_s < math.inf
    assert 0 < link.latency_s < 0.05


def test_a_link_server_serves_only_who_knows_its_secret() -> None:
    server = LinkServer("127.0.0.1")
    ip, port, secret = server.address
    try:
        with pytest.raises((EOFError, OSError)):
            measure_link((ip, port, bytes(len(secret))), 0.2)
    finally:
        server.close()


def test_an_unreachable_link_raises() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            measure_link(("127.0.0.1", free.getsockname()[1], bytes(16)), 0.2)


def test_a_device_has_a_speed() -> None:
    assert flops_meter("cpu", 0.05)(0.05) > 1e7
    assert memory_meter("cpu")(0.05) > 1e6


@pytest.mark.parametrize("count", range(1, 8))
def test_a_tournament_plays_every_pair_once_and_nobody_twice_a_round(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    rounds = tournament(names)
    played = [frozenset(match) for matches in rounds for match in matches]
    assert sorted(map(sorted, played)) == sorted(map(list, combinations(names, 2)))
    assert all(len({n for match in matches for n in match}) == 2 * len(matches) for matches in rounds)
    assert len(rounds) <= max(0, count - 1 + count % 2)


@pytest.mark.parametrize("nodes", [2, 3, 8, 64])
def test_all_links_of_a_cluster_are_measured_in_half_a_minute(nodes: int) -> None:
    rounds = len(tournament([f"n{i}" for i in range(nodes)])) + 1  # and one inside the nodes
    assert 0.4 <= link_share(rounds, math.inf) <= min(8.0, 28 / rounds)
    assert rounds * link_share(rounds, 10.0) <= 10.0


@pytest.mark.parametrize(("bytes_per_s", "trip_s"), [(125e3, 0.1), (12.5e6, 0.04), (1.25e9, 1e-4)])
def test_a_links_speed_is_told_however_its_first_transfers_mislead(bytes_per_s: float, trip_s: float) -> None:
    asked = []

    def transfer(n_bytes: int, window: int) -> tuple[float, float]:
        asked.append((n_bytes, window))
        held_back = min(n_bytes, window) / trip_s  # at most a window arrives in a round trip
        speed = min(bytes_per_s, held_back)
        return speed, trip_s + n_bytes / speed

    assert _bandwidth(transfer, trip_s, time.monotonic() + 60) == bytes_per_s
    assert all(window <= max(1 << 16, 4 * bytes_per_s * (trip_s + 5e-3)) for _, window in asked)
    stalled = iter([(8e3, 1.5), (bytes_per_s, 0.01)])
    assert _bandwidth(lambda n, w: next(stalled), trip_s, time.monotonic()) == bytes_per_s


def test_a_steady_speed_leaves_out_the_slow_start_the_pauses_and_the_end() -> None:
    speeds = [1.0] * 10 + [10.0] * 60 + [0.0] * 50 + [10.0] * 60 + [1.0] * 10  # bytes in each second
    arrived, samples = 0.0, [(0, 0.0)]
    for second, speed in enumerate(speeds):
        arrived += speed
        samples.append((int(arrived), second + 1.0))
    assert _steady_speed(samples) == pytest.approx(10.0)
    assert _steady_speed([(0, 1.0), (1000, 2.0)]) == 0.0


@pytest.mark.parametrize(
    ("rounds", "enough"),
    [
        ([], False),
        ([[100.0, 50.0]] * 2, False),  # too few
        ([[100.0, 50.0]] * 3, True),
        ([[100.0, 50.0], [60.0, 51.0], [98.0, 20.0]], True),  # each device was twice at its best
        ([[100.0, 50.0], [60.0, 51.0], [70.0, 20.0]], False),  # the first device's best may be a chance
        ([[100.0, 50.0], [60.0, 51.0], [70.0, 20.0], [99.0, 50.0]], True),
    ],
)
def test_rounds_agree_when_each_devices_best_was_seen_twice(rounds: list[list[float]], enough: bool) -> None:
    assert agree(rounds) == enough


def test_devices_that_are_alike_are_as_fast_as_each_other_unless_one_is_much_slower() -> None:
    def device(node: str, niceness: int = 0) -> Device:
        return Device(id="d", kind="cpu", node=node, cores=(0,), niceness=niceness)

    here, there, small = device("a"), device("b"), device("a", 4)
    assert level([10.0, 10.8, 7.0, 5.0], [here, here, there, small]) == [10.4, 10.4, 7.0, 5.0]
    assert level([10.0, 5.0], [here, here]) == [10.0, 5.0]
    assert level([0.0, 0.0], [here, here]) == [0.0, 0.0]
    assert level([], []) == []
