"""The endpoint's description is true, and nothing that fits it or breaks it makes an error of the endpoint's own."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from nesa_ray.graph.capture import Captured
from nesa_ray.serving.api import application
from nesa_ray.serving.config import PredictConfig, ServeConfig
from nesa_ray.serving.predict.api import application as predict_application
from nesa_ray.serving.predict.blueprint import capture_predicted
from nesa_ray.serving.predict.blueprint import draw as draw_predicted
from nesa_ray.serving.predict.predictor import Predictor, each_alone
from nesa_ray.serving.stages import LocalStages
from tests.unit.models import random_plan
from tests.unit.serving.conftest import VOCABULARY, Model, start

CASES = 1000
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/status", "/metrics")
TRUE = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
)


def known(value: Any, below: int) -> Any:
    """The same with smaller integers."""
    if isinstance(value, list):
        return [known(v, below) for v in value]
    return int(value) % below if isinstance(value, int | float) else value


def test_a_thousand_requests_that_fit_the_description_or_dont(
    model: Callable[[str], Model], captured: Callable[[ServeConfig], Captured]
) -> None:
    answered: Counter[tuple[str, int]] = Counter()

    def send(path: str, method: str, mode: GenerationMode, cases: int) -> None:
        @settings(
            max_examples=cases,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=described[path][method].as_strategy(generation_mode=mode))
        def each(case: schemathesis.Case) -> None:
            if mode.is_positive and isinstance(case.body, dict):  # what the description can't know
                case.body["model"] = "tiny"
                case.body |= {f: known(case.body[f], VOCABULARY) for f in ("prompt", "input") if f in case.body}
                sizes = [f for f in ("max_tokens", "max_completion_tokens", "n") if case.body.get(f)]
                case.body |= {f: 1 + known(case.body[f], 4) for f in sizes}
            answered[path, case.call_and_validate(checks=list(TRUE)).status_code] += 1

        each()

    with start(model("qwen3"), captured, name="tiny", max_tokens=2, context=64) as engine:
        described = schemathesis.openapi.from_asgi("/openapi.json", application(lambda: engine, engine.config))
        for path in POSTS:
            send(path, "POST", GenerationMode.POSITIVE, 165)
            send(path, "POST", GenerationMode.NEGATIVE, 165)
        for path in GETS:
            send(path, "GET", GenerationMode.POSITIVE, 20)
    assert sum(answered.values()) >= CASES
    assert all(answered[path, 200] and answered[path, 400] for path in POSTS)
    assert all(answered[path, 200] for path in GETS if path != "/v1/models/{name}")


def test_rows_that_fit_the_description_of_a_classifier_or_dont() -> None:
    answered: Counter[int] = Counter()
    config = PredictConfig(model="tests.unit.serving.predicted:looked_up", max_waiting=6)
    captured = capture_predicted(config)
    blueprint = draw_predicted(config, captured, random_plan(captured, 2, seed=1))
    predictor = Predictor(config, blueprint=blueprint, stages=LocalStages(blueprint), batched=each_alone)
    described = schemathesis.openapi.from_asgi("/openapi.json", predict_application(lambda: predictor, config))
    conforms = [c for c in TRUE if c is not checks.negative_data_rejection]  # numpy takes true among numbers for 1

    def send(mode: GenerationMode) -> None:
        @settings(
            max_examples=150,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=described["/predict"]["POST"].as_strategy(generation_mode=mode))
        def each(case: schemathesis.Case) -> None:
            if mode.is_positive and isinstance(case.body, dict):  # what the description can't say
                fewest = min(map(len, case.body["inputs"].values()))
                case.body["inputs"] = {n: rows[:fewest] for n, rows in case.body["inputs"].items()}
                case.body["inputs"]["ids"] = [int(i) % 10 for i in case.body["inputs"]["ids"]]
            answer = case.call_and_validate(checks=conforms)
            status = answer.status_code
            assert not (mode.is_positive and isinstance(case.body, dict)) or status == 200, answer.text
            answered[status] += 1

        each()

    try:
        send(GenerationMode.POSITIVE)
        send(GenerationMode.NEGATIVE)
    finally:
        predictor.close()
    assert answered[200] > 50
    assert answered[400] > 50
