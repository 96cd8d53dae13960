"""TrainConfig: what doesn't go together is refused."""

import pytest

from nesa_ray.errors import InvalidConfig
from nesa_ray.training.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "interleaved"}, "stages_per_device: needs ≥ 2 with schedule interleaved, got None"),
        ({"stages_per_device": 2}, "stages_per_device: needs 1 with schedule auto, got 2"),
        ({"stages_per_device": 0}, "stages_per_device: needs an integer ≥ 1, got 0"),
    ],
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        TrainConfig.from_dict({"model": "m", "data": {"paths": ["x"], "sequence_length": 8}, "output": "o", **settings})
