from pathlib import Path

import pytest

from nesa_ray.errors import InvalidConfig
from nesa_ray.serving.config import ServeConfig


def test_yaml_is_read_and_relative_paths_are_its_directorys(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nblock_size: 8\ndtype: float32\nadapters: {sql: runs/sql, prose: /prose}\n")
    config = ServeConfig.from_yaml(file)
    assert config.adapters == {"sql": str(tmp_path / "runs/sql"), "prose": "/prose"}
    assert config.model == str(tmp_path / "tiny")
    assert (config.block_size, config.served_name, config.plan) == (8, "tiny", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\nblock_sizes: 8\n", "block_sizes: unknown field (did you mean 'block_size'?)"),
        ("block_size: 8\n", "model: missing"),
        ("model: m\nblock_size: 0\n", "block_size: needs an integer ≥ 1, got 0"),
        ("model: m\nport: 70000\n", "port: needs a number up to 65535"),
        ("model: m\nprefix_cache: 1\n", "prefix_cache: needs true or false"),
        ("model: m\ndtype: float8\n", "dtype: needs one of"),
        ("model: m\nweights: int4\n", "weights: needs one of auto, int8, got 'int4'"),
        ("model: [1\n", "not YAML"),
        ("- model\n", "needs a mapping"),
        ("model: m\napi_keys: []\n", "api_keys: needs a list of keys"),
        ("model: m\napi_keys: [1]\n", "api_keys: needs a list of keys"),
        ("model: m\nreplicas: 3\nmax_replicas: 2\n", "max_replicas: needs at least replicas, 3, got 2"),
        ("model: m\nreplicas: 2\nplan: plan.json\n", "plan: several replicas need a plan each"),
        ("model: m\npooling: cls\n", "pooling: needs one of mean, last, none"),
        ("model: 3\n", "model: needs a string"),
        ("model: m\nadapters: [a]\n", "adapters: needs a mapping of names to directories, got ['a']"),
        ("model: m\nadapters: {1: a}\n", "adapters: needs texts as names, got 1"),
        ("model: m\nadapters: {a: }\n", "adapters.a: needs a directory, got None"),
        ("model: m\nadapters: {m: a}\n", "adapters.m: is what the model itself is called"),
    ],
)
def test_bad_configuration_names_the_field_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfig) as e:
        ServeConfig.from_yaml(file)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.yaml: can't be read"):
        ServeConfig.from_yaml(tmp_path / "none.yaml")
