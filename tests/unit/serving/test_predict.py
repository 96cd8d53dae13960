"""Models that aren't decoders, over stages in this process: equal to the whole, in batches, over HTTP."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import save_file
from starlette.testclient import TestClient

from nesa_ray.errors import CheckpointError, InvalidConfig, InvalidInput, Overloaded, RuntimeFailure
from nesa_ray.planning.plan import Plan
from nesa_ray.serving.config import PredictConfig
from nesa_ray.serving.predict.api import application
from nesa_ray.serving.predict.blueprint import capture_predicted, draw
from nesa_ray.serving.predict.form import Form, Value
from nesa_ray.serving.predict.predictor import Batched, Compute, Entry, Predictor, each_alone
from nesa_ray.serving.predict.wire import ARROW, JSON, read_arrow
from nesa_ray.serving.stages import LocalStages
from tests.unit.models import manual_plan, random_plan, relative_error
from tests.unit.serving import predicted
from tests.unit.serving.test_edge import until

Serve = Callable[..., Predictor]
FUNCTIONS = "tests.unit.serving.predicted:"
BERT = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61, num_labels=3,
    max_position_embeddings=32, initializer_range=0.5, architectures=["BertForSequenceClassification"],
)  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
    num_labels=5, initializer_range=0.5, architectures=["ViTForImageClassification"],
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], tuple[str, Any]]:
    """Makes a Hugging Face directory of a configuration's model, with weights; and the model."""

    def make(config: Any) -> tuple[str, Any]:
        torch.manual_seed(5)
        model = getattr(transformers, config.architectures[0])(config).eval()
        path = tmp_path_factory.mktemp(config.model_type)
        model.save_pretrained(path)
        return str(path), model

    return make


def start(
    model: str, plan: Plan | None = None, stages: int = 3, batched: Any = each_alone, **options: Any
) -> Predictor:
    config = PredictConfig(model=model, **options)
    captured = capture_predicted(config)
    blueprint = draw(config, captured, plan or random_plan(captured, stages, seed=1))
    return Predictor(config, blueprint=blueprint, stages=LocalStages(blueprint), batched=batched)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(model, plan, **config): a predictor over stages in this process; closed at the end of the test."""
    running: list[Predictor] = []

    def make(*args: Any, **options: Any) -> Predictor:
        running.append(start(*args, **options))
        return running[-1]

    yield make
    for predictor in running:
        predictor.close()


def ask(predictor: Predictor, *requests: dict[str, torch.Tensor]) -> list[Any]:
    """Several requests at once: what each gets, or its error."""
    given = [predictor.form.check({n: t.numpy() for n, t in r.items()}, finite=True) for r in requests]

    async def together() -> list[Any]:
        return await asyncio.gather(*(predictor.predict(g) for g in given), return_exceptions=True)

    return asyncio.run(together())


def batches_of(size: int) -> Callable[[Compute], Batched]:
    """As Ray Serve batches rows that come at once."""

    def batched(compute: Compute) -> Batched:
        here: list[tuple[Entry, asyncio.Future[Any]]] = []

        async def row(entry: Entry) -> Any:
            here.append((entry, asyncio.get_running_loop().create_future()))
            _, mine = here[-1]
            if len(here) == size:
                batch = here[:]
                here.clear()
                for (_, one), result in zip(batch, await compute([e for e, _ in batch]), strict=True):
                    one.set_result(result)
            return await mine

        return row

    return batched


def close_to(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.shape == wanted.shape and relative_error(got, wanted) < 1e-5


def texts(rows: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (rows, 1), generator=g)
    mask = (torch.arange(9) < lengths).long()
    return {"input_ids": torch.randint(0, 61, (rows, 9), generator=g), "attention_mask": mask}


@torch.no_grad()
def test_a_text_classifier_equals_the_whole_whatever_is_beside_it_in_the_batch(
    directory: Callable[[Any], tuple[str, Any]], serve: Serve
) -> None:
    path, whole = directory(BERT)
    predictor = serve(path, tokens=9, batch_size=4)
    assert [i.described() for i in predictor.form.inputs] == [
        {"name": "input_ids", "dtype": "int64", "shape": [9], "below": 61},
        {"name": "attention_mask", "dtype": "int64", "shape": [9], "default": 1},
        {"name": "token_type_ids", "dtype": "int64", "shape": [9], "default": 0, "below": 2},
    ]
    requests = [texts(rows, seed=rows) for rows in (1, 3, 7)]
    pair = {**texts(2, seed=9), "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)}
    for request, got in zip((*requests, pair), ask(predictor, *requests, pair), strict=True):
        assert close_to(got["logits"], whole(**request).logits)
    unmasked = {"input_ids": requests[0]["input_ids"]}
    assert close_to(ask(predictor, unmasked)[0]["logits"], whole(**unmasked).logits)
    together = serve(path, tokens=9, batch_size=4, batched=batches_of(3))
    mixed = [texts(rows, seed=10 + rows) for rows in (1, 2, 4, 1, 1)]
    for request, got in zip(mixed, ask(together, *mixed), strict=True):
        assert close_to(got["logits"], whole(**request).logits)
    assert [together.metrics.total(n) for n in ("batches", "rows", "filling_rows")] == [3, 9, 3]
    # Each stage holds its own weights alone, and they come from the directory.
    stored = [set(w._module.state_dict()) for w in predictor._stages.workers]  # type: ignore[attr-defined]
    assert all(h == set(s.program.state) for h, s in zip(stored, predictor.blueprint.specs, strict=True))
    assert not {n for s in predictor.blueprint.specs for n in s.weights.values} & set(dict(whole.named_parameters()))


@torch.no_grad()
def test_images(directory: Callable[[Any], tuple[str, Any]], serve: Serve) -> None:
    images = torch.randn(3, 3, 16, 16)
    path, whole = directory(VIT)
    assert close_to(ask(serve(path, batch_size=2), {"pixel_values": images})[0]["logits"], whole(images).logits)
    normalised = predicted.resnet()[0].eval()  # by its running statistics, which the batch must not move
    predictor = serve(FUNCTIONS + "resnet")
    for _ in range(2):
        (got,) = ask(predictor, {"pixel_values": images})
        assert close_to(got["output"], normalised(images))


@torch.no_grad()
def test_two_towers_on_stages_of_their_own_and_weights_of_a_directory(serve: Serve, tmp_path: Path) -> None:
    whole = predicted.two_towers()[0]
    whole.left[0].weight.mul_(2)  # what was trained isn't what the function makes
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    captured = capture_predicted(PredictConfig(model=FUNCTIONS + "empty_towers"))
    side = {n.id: n.name for n in captured.graph.nodes}
    towers = [[i for i in side if captured.graph.order.index(i) in part] for part in (range(3), range(3, 6), (6, 7))]
    plan = manual_plan(captured.graph, towers)
    request = {"user": torch.randn(5, 6), "item": torch.randn(5, 5)}
    predictor = serve(FUNCTIONS + "empty_towers", plan, weights=str(tmp_path))
    left, right, last = (s.program for s in predictor.blueprint.specs)
    assert (left.inputs, right.inputs, last.inputs) == (("user",), ("item",), ())
    (got,) = ask(predictor, request)
    wanted = whole(**request)
    assert got.keys() == wanted.keys()
    assert all(close_to(got[n], wanted[n]) for n in wanted)
    with pytest.raises(CheckpointError, match="have no values"):
        serve(FUNCTIONS + "empty_towers")


@torch.no_grad()
def test_several_outputs_are_named_by_where_they_are(serve: Serve) -> None:
    whole, x = predicted.several_heads()[0], torch.randn(6, 8)
    (got,) = ask(serve(FUNCTIONS + "several_heads"), {"x": x})
    wanted = whole(x)
    assert close_to(got["classes"], wanted["classes"])
    assert close_to(got["aux.0"], wanted["aux"][0])
    assert close_to(got["aux.1"], wanted["aux"][1])


def row(index: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor([index]), "scale": torch.ones(1, 4)}


@torch.no_grad()
def test_a_row_that_cant_be_computed_takes_no_other_with_it(serve: Serve) -> None:
    predictor, whole = serve(FUNCTIONS + "looked_up", stages=2, batched=batches_of(3)), predicted.looked_up()[0]
    for _ in range(2):
        first, wrong, last = ask(predictor, row(3), row(10), row(9))
        assert isinstance(wrong, InvalidInput)
        assert str(wrong).startswith("inputs: stage 0 can't compute them: IndexError: index 10 is out of bounds")
        for got, index in ((first, 3), (last, 9)):
            assert close_to(got["0"], whole(**row(index))[0])
            assert got["1"].dtype is torch.bool
    assert predictor.state == "ready"
    assert predictor.metrics.total("refused_batches") == 4


def held(predictor: Predictor, stage: int) -> threading.Event:
    """That stage computes nothing until the event is set."""
    gate, worker = threading.Event(), predictor._stages.workers[stage]  # type: ignore[attr-defined]
    compute = worker._compute
    worker._compute = lambda *step: gate.wait(10) and compute(*step)
    return gate


def test_rows_that_are_given_up_while_they_wait_leave_their_place_to_others(serve: Serve) -> None:
    predictor = serve(FUNCTIONS + "looked_up", stages=2, batches_in_flight=1, batched=batches_of(4))
    gate, four = held(predictor, 0), {"ids": torch.arange(4), "scale": torch.ones(4, 4)}

    async def crowd() -> None:
        first, given_up, last = (asyncio.ensure_future(predictor.predict(four)) for _ in range(3))
        while not predictor._under_way:
            await asyncio.sleep(0.01)
        assert len(predictor._waiting) == 8
        given_up.cancel()
        gate.set()
        assert len((await first)["0"]) == len((await last)["0"]) == 4
        assert given_up.cancelled()

    asyncio.run(crowd())
    assert predictor._rows == predictor._entered == predictor._made_up == len(predictor._waiting) == 0
    assert predictor.metrics.total("batches") == 2


def test_stages_compute_several_batches_at_once_and_too_many_rows_are_refused(serve: Serve) -> None:
    predictor = serve(FUNCTIONS + "looked_up", stages=2, max_waiting=6)
    first, last = predictor._stages.workers  # type: ignore[attr-defined]
    gate = held(predictor, 1)

    async def crowd() -> list[Any]:
        many = [asyncio.ensure_future(predictor.predict(row(i))) for i in range(6)]
        while first.stats()["steps"] < 3:  # three batches are under way, and the last stage hasn't done one
            await asyncio.sleep(0.01)
        assert last.stats()["steps"] == 0
        with pytest.raises(Overloaded, match="6 rows are under way"):
            await predictor.predict(row(0))
        assert len(predictor._under_way) == 3
        gate.set()
        return await asyncio.gather(*many)

    assert len(asyncio.run(crowd())) == 6
    assert len(ask(predictor, row(0))) == 1
    with pytest.raises(InvalidInput, match="at most 6 rows"):
        raise ask(predictor, {"ids": torch.zeros(7, dtype=torch.long), "scale": torch.ones(7, 4)})[0]


def test_a_stage_that_breaks_ends_what_is_under_way_by_its_name(serve: Serve) -> None:
    predictor = serve(FUNCTIONS + "looked_up", stages=2)
    predictor._stages.workers[1]._module = None  # type: ignore[attr-defined]
    predictor._stages.workers[1]._made = None  # type: ignore[attr-defined]
    with TestClient(application(lambda: predictor, predictor.config)) as http:
        answer = http.post("/predict", json={"inputs": {"ids": [1], "scale": [[1, 1, 1, 1]]}})
        assert answer.status_code == 503
        assert "stage 1" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503
    with pytest.raises(RuntimeFailure, match="stage 1"):
        predictor.check_health()


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    predictor = start(FUNCTIONS + "looked_up", name="looked", stages=2, max_body_bytes=4096, max_waiting=50)
    with TestClient(application(lambda: predictor, predictor.config), raise_server_exceptions=False) as client:
        yield client
    predictor.close()


def stream(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


@torch.no_grad()
@pytest.mark.parametrize("accept", [JSON, ARROW])
@pytest.mark.parametrize("form", ["json", "tensors", "lists"])
def test_json_and_arrow_in_and_out(http: TestClient, accept: str, form: str) -> None:
    ids, scale = torch.tensor([1, 2, 9]), torch.randn(3, 4)
    wanted = predicted.looked_up()[0](ids, scale)
    columns = {
        "tensors": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(scale.numpy()),
        "lists": lambda: pa.array(scale.double().tolist()),
    }
    if form == "json":
        body: bytes = json.dumps({"inputs": {"ids": ids.tolist(), "scale": scale.tolist()}}).encode()
    else:
        body = stream(ids=pa.array(ids.tolist(), pa.int32()), scale=columns[form]())
    kind = JSON if form == "json" else ARROW
    answer = http.post("/predict", content=body, headers={"content-type": kind, "accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == accept
    if accept == JSON:
        outputs = answer.json()["outputs"]
        assert outputs["1"] == wanted[1].tolist()
        got = torch.tensor(outputs["0"])
    else:
        with pa.ipc.open_stream(answer.content) as reader:
            table = reader.read_all()
        assert isinstance(table.schema.field("0").type, pa.FixedShapeTensorType)
        assert table.column("1").to_pylist() == wanted[1].tolist()
        got = torch.tensor(table.column("0").combine_chunks().to_numpy_ndarray())
    assert close_to(got, wanted[0])


def test_arrow_columns_of_several_dimensions() -> None:
    form = Form(4, (Value("x", "x", torch.float32, (2, 3)),), ())
    x = torch.randn(5, 2, 3)
    layouts = {
        "as they lie": pa.FixedShapeTensorArray.from_numpy_ndarray(x.numpy()),
        "transposed": pa.FixedShapeTensorArray.from_numpy_ndarray(x.mT.contiguous().numpy().transpose(0, 2, 1)),
        "lists": pa.array(x.tolist(), pa.large_list(pa.list_(pa.float32(), 3))),
        "a part": pa.array([[], *x.tolist()], pa.list_(pa.list_(pa.float64())))[1:],
    }
    assert layouts["transposed"].type.permutation == [1, 0]
    for layout, column in layouts.items():
        assert close_to(read_arrow(form, stream(x=column))["x"], x), layout


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"ids": [1], "scale": [[1, 1, 1]]}, "inputs.scale: needs the shape [rows, 4], got [1, 3]"),
        ({"ids": 1, "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs a list of rows"),
        ({"ids": [1, 2], "scale": [[1, 1, 1, 1]]}, "inputs.scale: has 1 rows, ids has 2"),
        ({"ids": [1]}, "inputs.scale: missing, needs the shape [rows, 4]"),
        ({"ids": [1], "scales": [[1, 1, 1, 1]]}, "no such input (did you mean 'scale'?)"),
        ({"ids": [], "scale": []}, "inputs.ids: needs at least one row"),
        ({"ids": [1.5], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs integers, got float64"),
        ({"ids": ["1"], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs numbers"),
        ({"ids": [None], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs numbers"),
        ({"ids": [1], "scale": [[1, 1, True, 1]]}, "inputs.scale: has true or false among numbers"),
        ({"ids": [True], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs integers, got bool"),
        ({"ids": [1 << 70], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs numbers within 64 bits"),
        ({"ids": [(1 << 64) - 1], "scale": [[1, 1, 1, 1]]}, "inputs.ids: needs integers from"),
        ({"ids": [1, 2], "scale": [[1, 1, 1, 1], [1, 1]]}, "inputs.scale: rows differ in shape"),
        ({"ids": [1], "scale": [[1, 1, 1, 1e39]]}, "inputs.scale: needs finite numbers, up to 3.4e+38 for float32"),
        ({"ids": [99], "scale": [[1, 1, 1, 1]]}, "can't compute them: IndexError"),
        ({"ids": [1] * 51, "scale": [[1, 1, 1, 1]] * 51}, "inputs: at most 50 rows in a request, got 51"),
        ({}, "inputs.ids: missing"),
        ([], "inputs: needs an object"),
    ],
)
def test_bad_inputs_are_the_clients_error_in_one_line(http: TestClient, inputs: Any, says: str) -> None:
    answer = http.post("/predict", json={"inputs": inputs})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("inputs")


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": {"ids": [1], "scale": [[NaN, 1, 1, 1]]}}',
        b'{"inputs": {"ids": [1], "scale": [[1e400, 1, 1, 1]]}}',
        b'{"inputs": {"ids": ' + b"[" * 1000 + b"]" * 1000 + b', "scale": []}}',
        b'{"inputs": {"ids": [' + b"9" * 4000 + b"]}}",
        b'{"input": {}}',
        '{"inputs": {"ids": [1], "scale": [[1, 1, true, 1]]}}'.encode("utf-16"),
        b"[]",
        b"{",
        b"",
        b"\xff\xfe",
        b"[" * 4000,
    ],
)
def test_bodies_that_are_no_json_request(http: TestClient, body: bytes) -> None:
    answer = http.post("/predict", content=body, headers={"content-type": JSON})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_bodies_that_are_no_arrow_request(http: TestClient) -> None:
    whole = stream(ids=[1], scale=[[1.0, 1.0, 1.0, 1.0]])
    bodies = {
        "isn't an Arrow IPC stream": [b"", b"ARROW1", whole[:-80], json.dumps({}).encode()],
        "inputs.scale: rows differ in shape": [stream(ids=[1, 2], scale=[[1.0, 1.0, 1.0, 1.0], [1.0]])],
        "inputs.scale: has nulls": [stream(ids=[1], scale=[[1.0, None, 1.0, 1.0]])],
        "inputs.ids: needs numbers": [stream(ids=["a"], scale=[[1.0] * 4])],
        "inputs.ids: needs at least one row": [stream(ids=pa.array([], pa.int64()), scale=pa.array([], pa.int64()))],
        "inputs.other: the model has no such input": [stream(other=[1])],
    }
    for says, several in bodies.items():
        for body in several:
            answer = http.post("/predict", content=body, headers={"content-type": ARROW})
            assert answer.status_code == 400, answer.text
            assert says in answer.json()["error"]["message"]


def test_other_kinds_sizes_and_keys(http: TestClient) -> None:
    assert http.post("/predict", content=b"a,b", headers={"content-type": "text/csv"}).status_code == 415
    assert http.post("/predict", content=b" " * 5000).status_code == 413
    assert http.get("/predict").status_code == 405
    described = http.get("/model").json()
    assert described["batch_size"] == 4
    assert described["inputs"][1] == {"name": "scale", "dtype": "float32", "shape": [4]}
    assert [o["dtype"] for o in described["outputs"]] == ["float32", "bool"]
    assert http.get("/health").json()["status"] == "ready"
    assert 'nesa_predict_http_requests_total{model="looked",route="/predict",status="415"}' in http.get("/metrics").text


def test_keys_are_asked_for_and_time_is_limited(serve: Serve) -> None:
    predictor = serve(FUNCTIONS + "looked_up", stages=2, api_keys=["key"], request_timeout_s=0.3)
    gate = held(predictor, 0)
    body = {"inputs": {"ids": [1], "scale": [[1, 1, 1, 1]]}}
    with TestClient(application(lambda: predictor, predictor.config)) as http:
        assert http.post("/predict", json=body).status_code == 401
        assert http.get("/model").status_code == 401
        late = http.post("/predict", json=body, headers={"authorization": "Bearer key"})
        assert late.status_code == 504
        gate.set()
        until(lambda: not predictor._under_way)
        assert predictor._rows == predictor._entered == predictor._made_up == 0
        assert http.post("/predict", json=body, headers={"authorization": "Bearer key"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": FUNCTIONS + "looked_up", "batch_size": 8}, "batch_size: the example of"),
        ({"model": FUNCTIONS + "transposed"}, "model: output output: needs 4 rows, one a sample, has [3, 4]"),
        ({"model": FUNCTIONS + "none"}, "isn't a function that can be imported"),
        ({"model": "m", "weights": "w"}, "weights: are those of a function's module"),
        ({"model": "m", "batch_wait_s": -1}, "batch_wait_s: needs a number ≥ 0"),
        ({"model": "m", "batchsize": 1}, "batchsize: unknown field (did you mean 'batch_size'?)"),
        ({}, "model: missing, needs a Hugging Face model directory or package.module:function"),
    ],
)
def test_bad_configuration_names_the_field_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig) as e:
        capture_predicted(PredictConfig.from_dict(options))
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_a_decoder_is_sent_to_the_other_application(tmp_path: Path) -> None:
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(InvalidConfig, match=r"is a decoder: serve it by serve_apps\.llm"):
        capture_predicted(PredictConfig(model=str(tmp_path)))


def test_a_function_isnt_a_path_and_weights_are(tmp_path: Path) -> None:
    (tmp_path / "predict.yaml").write_text(f"model: {FUNCTIONS}two_towers\nweights: run/model\n")
    config = PredictConfig.from_yaml(tmp_path / "predict.yaml", batch_wait_s=0.1)
    assert (config.model, config.weights) == (FUNCTIONS + "two_towers", str(tmp_path / "run/model"))
