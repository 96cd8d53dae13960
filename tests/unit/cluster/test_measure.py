import math
import socket
from itertools import combinations

import pytest

from nesa_ray.cluster.measure import LinkServer, measure_flops, measure_link, measure_memory
from nesa_ray.cluster.probe import link_share, tournament


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
    assert measure_flops("cpu", 0.05) > 1e7
    assert measure_memory("cpu", 0.05) > 1e6


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
