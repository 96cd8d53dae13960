"""The one Ray cluster of the test run: two unequal nodes of two devices each, on two cores; this process drives it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nesa_ray.cluster.local import LocalCluster, LocalNode


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this directory have the machine to themselves."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """`big` (2 GB a device) and `small` (1 GB a device, a smaller share of the same cores).

    Commands started from tests (`ray job submit`, `serve run`) find it through the environment.
    """
    nodes = [
        LocalNode(name="big", memory_bytes=2e9, spare_cpus=2),
        LocalNode(name="small", memory_bytes=1e9, niceness=5),
    ]
    with LocalCluster(nodes) as running:
        running.connect()
        yield running


@pytest.fixture(scope="session")
def measured(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster.json of a probe: measured once, planned for by the tests that aren't about measuring."""
    from nesa_ray.cluster.probe import probe

    file = tmp_path_factory.mktemp("probe") / "cluster.json"
    probe().to_json(file)
    return file
