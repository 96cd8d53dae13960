"""A text classifier on the cluster, its rows batched by Ray Serve, asked over HTTP by many at once."""

import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from ray import serve
from transformers import BertConfig, BertForSequenceClassification

from nesa_ray.cluster.local import LocalCluster, free_ports
from nesa_ray.planning.plan import Plan, Stage
from nesa_ray.serving.config import PredictConfig
from nesa_ray.serving.predict.blueprint import capture_predicted
from nesa_ray.serving.predict.wire import ARROW, JSON
from serve_apps.predict import build
from tests.integration.test_serve import check_all_is_free
from tests.unit.models import even_plan, relative_error

TOKENS, CLASSES = 12, 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier, a plan that crosses nodes, and its predict.yaml."""
    path = tmp_path_factory.mktemp("predicted")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.5, num_labels=CLASSES,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(path / "model")
    (path / "predict.yaml").write_text(f"model: model\nname: tiny\nplan: plan.json\ntokens: {TOKENS}\nbatch_size: 4\n")
    captured = capture_predicted(PredictConfig(model=str(path / "model"), tokens=TOKENS, batch_size=4))
    parts = even_plan(captured, 2).stages
    stages = [
        Stage(id=s.id, devices=(d,), nodes=s.nodes) for s, d in zip(parts, ("small/cpu1", "big/cpu0"), strict=True)
    ]
    plan = Plan(objective="throughput", stages=tuple(stages), bottleneck_s=0.0, latency_s=0.0, lower_bound_s=0.0)
    plan.to_json(path / "plan.json")
    return path


@pytest.fixture
def port(cluster: LocalCluster, directory: Path) -> Iterator[int]:
    """Where the application answers; it ends with the test."""
    (free,) = free_ports(1)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": free})
    serve.run(build({"config": str(directory / "predict.yaml"), "batch_wait_s": "0.05"}), name="predict")
    yield free
    serve.shutdown()


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> bytes:
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, named), timeout=60) as a:
        return bytes(a.read())


def texts(seed: int) -> dict[str, torch.Tensor]:
    """One to six texts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    rows = seed % 6 + 1
    mask = (torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (rows, 1), generator=g)).long()
    return {"input_ids": torch.randint(0, 61, (rows, TOKENS), generator=g), "attention_mask": mask}


def as_json(port: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    body = json.dumps({"inputs": {n: t.tolist() for n, t in inputs.items()}}).encode()
    return torch.tensor(json.loads(ask(port, "/predict", body, content_type=JSON))["outputs"]["logits"])


def as_arrow(port: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    sink = io.BytesIO()
    table = pa.table({n: pa.FixedShapeTensorArray.from_numpy_ndarray(t.numpy()) for n, t in inputs.items()})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    answer = ask(port, "/predict", sink.getvalue(), content_type=ARROW, accept=ARROW)
    return torch.tensor(pa.ipc.open_stream(answer).read_all().column("logits").combine_chunks().to_numpy_ndarray())


def counted(port: int) -> dict[str, Any]:
    lines = ask(port, "/metrics").decode().splitlines()
    return {n: float(x.rpartition(" ")[2]) for x in lines for n in ("batches", "rows", "filling_rows")
            if x.startswith(f"nesa_predict_{n}_total")}  # fmt: skip


@torch.no_grad()
def test_many_requests_of_mixed_sizes_at_once(port: int, directory: Path) -> None:
    whole = BertForSequenceClassification.from_pretrained(directory / "model").eval()
    requests = [texts(seed) for seed in range(24)]
    wrong = {"input_ids": torch.full((1, TOKENS), 99)}
    with ThreadPoolExecutor(25) as clients:
        refused = clients.submit(as_json, port, wrong)
        asked = [clients.submit((as_json, as_arrow)[i % 2], port, r) for i, r in enumerate(requests)]
        for request, answer in zip(requests, asked, strict=True):
            assert relative_error(answer.result(), whole(**request).logits) < 1e-5
        with pytest.raises(urllib.error.HTTPError) as e:
            refused.result()
    assert e.value.code == 400
    assert json.load(e.value)["error"]["message"] == "inputs.input_ids: needs integers from 0 to 60, got 99"
    seen = counted(port)
    assert seen["rows"] == sum(len(r["input_ids"]) for r in requests) == 84
    assert seen["batches"] < len(requests) + 6  # 21 full ones at the least; each request by itself would take 36
    assert seen["rows"] + seen["filling_rows"] == 4 * seen["batches"]
    form = json.loads(ask(port, "/model"))
    assert form["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [CLASSES]}]
    assert json.loads(ask(port, "/health"))["ready"]
    serve.delete("predict")
    check_all_is_free()
