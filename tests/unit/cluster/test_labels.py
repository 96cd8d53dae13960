import pytest

from nesa_ray.cluster.labels import cores_to_label, label_to_cores
from nesa_ray.errors import InvalidTopology


@pytest.mark.parametrize(
    ("devices", "label"),
    [(((0,), (1,)), "0.1"), (((0, 1, 2, 3), (4, 5)), "0-3.4-5"), (((0, 2, 4),), "0_2_4"), (((7, 0, 1),), "7_0-1")],
)
def test_round_trip(devices: tuple[tuple[int, ...], ...], label: str) -> None:
    assert cores_to_label(devices) == label
    assert label_to_cores(label) == devices


@pytest.mark.parametrize("label", ["", "0,1", "a", "0..1", "-1", "1-"])
def test_a_label_that_cannot_be_read(label: str) -> None:
    with pytest.raises(InvalidTopology, match=r'nesa-cores: needs core numbers like "0\.1"'):
        label_to_cores(label)


def test_a_label_too_long_for_ray() -> None:
    with pytest.raises(InvalidTopology, match=r"40 devices need \d+ characters, a label has 63"):
        cores_to_label([(i,) for i in range(40)])
