"""Any model: captured, cut at random, trained in stages; loss and every gradient equal the uncut module's.

The table in docs/models.md is made from these cases: NESA_WRITE_DOCS=1 writes it, otherwise it must be up to date.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from nesa_ray.graph.capture import Captured
from nesa_ray.runtime.local import LocalPipeline
from tests.unit.graph.zoo import CASES, DECODERS, Case, token_batch
from tests.unit.models import random_plan, relative_error

DOCS = Path(__file__).parents[3] / "docs" / "models.md"
MICROBATCHES, TOLERANCE = 3, 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[torch.nn.Module, Captured]]:
    return {}


def build(case: Case, built: dict[str, Any]) -> tuple[torch.nn.Module, Captured]:
    if case.name not in built:
        built[case.name] = case.build()
    return built[case.name]


def tensors(output: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def whole_step(module: torch.nn.Module, case: Case, batches: Sequence[Any]) -> list[torch.Tensor]:
    losses = []
    for inputs, targets in batches:
        loss = case.loss(tensors(module(**inputs, **case.constants)), targets)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    return losses


def check_equal(mine: torch.nn.Module, whole: torch.nn.Module) -> None:
    """Every parameter's gradient, and every buffer.

    A gradient that is zero but for rounding (an attention's key bias) counts against 1e-6 of the whole gradient's norm.
    """
    floor = 1e-6 * float(torch.stack([p.grad.norm() for p in whole.parameters() if p.grad is not None]).norm())
    parameters = dict(whole.named_parameters())
    assert dict(mine.named_parameters()).keys() == parameters.keys()
    for name, p in parameters.items():
        other = mine.get_parameter(name).grad
        if p.grad is None:
            assert other is None or not other.any(), name
            continue
        assert float((other - p.grad).norm()) <= TOLERANCE * max(float(p.grad.norm()), floor), name
    for name, buffer in mine.named_buffers():
        expected = whole.get_buffer(name)
        if buffer.is_floating_point():
            assert relative_error(buffer, expected) <= TOLERANCE, name
        else:
            assert torch.equal(buffer, expected), name


def local_pipeline(module: torch.nn.Module, captured: Captured, stages: int, seed: int) -> LocalPipeline:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return LocalPipeline(
        captured, random_plan(captured, stages, seed), {n: t.detach().clone() for n, t in state.items()}
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_loss_and_every_gradient_equal_the_whole_models(case, built, rows):
    module, captured = build(case, built)
    assert module.training
    batches = [case.batch(m) for m in range(MICROBATCHES)]
    whole = copy.deepcopy(module)
    expected = whole_step(whole, case, batches)
    names = [o for o in captured.outputs if isinstance(o, str)]

    def loss(results: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return case.loss([results[n] for n in names], dict(targets))

    staged = local_pipeline(module, captured, case.stages, seed=len(case.name))
    losses = staged.step([{**i, **t} for i, t in batches], loss, targets=list(batches[0][1]), schedule="1f1b")
    for mine, other in zip(losses, expected, strict=True):
        assert relative_error(mine, other) <= TOLERANCE
    check_equal(staged, whole)

    called = local_pipeline(module, captured, case.stages, seed=len(case.shows))
    for mine, other in zip(whole_step(called, case, batches), expected, strict=True):
        assert relative_error(mine, other) <= TOLERANCE
    check_equal(called, whole)
    parameters = sum(1 for _ in whole.parameters())
    rows[case.name] = (
        f"| {case.name} | {case.shows} | {len(captured.graph.nodes)} | {case.stages} | {parameters} of {parameters} |"
    )


@pytest.mark.parametrize("case", [c for c in DECODERS if c.decoder], ids=lambda c: c.name)
def test_a_decoder_has_one_attention_node_a_layer_and_runs_at_any_shape(case, built):
    module, captured = build(case, built)
    attention = [n for n in captured.program.nodes if n.target is torch.ops.nesa.attention.default]
    assert len(attention) == 2
    whole = copy.deepcopy(module).eval()
    local = local_pipeline(module, captured, 3, seed=7).eval()
    for shape in ((1, 1), (3, 7)):
        inputs = {k: v for k, v in token_batch(5, shape)[0].items() if k in case.batch(0)[0]}
        with torch.no_grad():
            expected = whole(**inputs, **case.constants).logits
            assert relative_error(local(**inputs, **case.constants).logits, expected) <= 1e-6


def test_the_table_in_the_docs_is_what_these_tests_found(rows):
    missing = [c.name for c in CASES if c.name not in rows]
    if missing:
        pytest.skip(f"needs every case to have passed: {', '.join(missing)}")
    text = DOCS.read_text() if DOCS.exists() else "<!-- table -->\n<!-- end -->\n"
    before, _, rest = text.partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->")
    head = "| model | what it shows | operators | stages | gradients equal |\n|---|---|---|---|---|\n"
    made = f"{before}<!-- table -->\n{head}" + "\n".join(rows[c.name] for c in CASES) + f"\n<!-- end -->{after}"
    if os.environ.get("NESA_WRITE_DOCS"):
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(made)
    assert text == made or os.environ.get("NESA_WRITE_DOCS"), "run this file with NESA_WRITE_DOCS=1"
