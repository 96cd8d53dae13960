"""Whenever messages come, a step's gradients are the same to the bit, and no stage keeps more than it has room for."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nesa_ray.graph.capture import Captured
from nesa_ray.graph.models import capture_ref
from nesa_ray.graph.split import StageModule, stage_links
from nesa_ray.planning.schedule import ActionKind, zero_bubble
from nesa_ray.runtime.channel import LocalChannel, Mailbox, Tag
from nesa_ray.runtime.executor import Executor, Step
from nesa_ray.runtime.local import LocalPipeline
from nesa_ray.runtime.weight_gradient import WeightGradients
from tests.unit.models import even_plan

STAGES, MICRO_BATCHES, VOCABULARY = 3, 6, 97


class Uncertain(LocalChannel):
    """Says by chance that what is there isn't yet."""

    def __init__(self, name: str, mailboxes: dict[str, Mailbox], seed: int) -> None:
        super().__init__(name, mailboxes)
        self._random = random.Random(seed)

    def has(self, tag: Tag) -> bool:
        return super().has(tag) and self._random.random() < 0.4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Captured]:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    directory = tmp_path_factory.mktemp("llama")
    config.save_pretrained(directory)
    return model, capture_ref(directory, batch=2, tokens=8)


def batches() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (MICRO_BATCHES, 2, 9), generator=g)
    positions = torch.arange(8).expand(2, 8)
    return [{"input_ids": i[:, :-1], "position_ids": positions, "labels": i[:, 1:]} for i in ids]


def loss(results: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    (logits,) = results.values()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten())


@pytest.mark.parametrize("room", [1, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_dont_depend_on_when_messages_come(decoder, room, seed):
    model, captured = decoder
    plan = even_plan(captured, STAGES)
    expected = LocalPipeline(captured, plan, copy.deepcopy(model.state_dict()))
    expected.step(batches(), loss, targets=["labels"], schedule="zero_bubble")

    local = LocalPipeline(captured, plan, copy.deepcopy(model.state_dict()))
    weights = {**dict(local.named_parameters()), **dict(local.named_buffers())}
    links, final = stage_links(local.programs), local.programs[-1].id
    schedule = zero_bubble(links, MICRO_BATCHES, ahead=dict.fromkeys(links, room - 1))
    mailboxes: dict[str, Mailbox] = {}
    peers = {p.id: f"rank{p.id}" for p in local.programs}
    executors = {}
    for program in local.programs:
        store = WeightGradients()
        module = StageModule(program, weights, operators=store.operators)
        channel = Uncertain(peers[program.id], mailboxes, seed + program.id)
        executors[program.id] = Executor(
            {program.id: module}, channel, peers, final, loss=loss, targets=["labels"], weight_gradients=store,
            timeout_s=30,
        )  # fmt: skip
    done: list[int] = []

    def run(stage: int) -> Step:
        after = (lambda: done.append(stage)) if stage == 0 else None
        return executors[stage].run(schedule, stage, {stage: weights}, first=7, after_forwards=after)

    with ThreadPoolExecutor(STAGES) as pool:
        steps = {s: pool.submit(run, s) for s in executors}
        for number, values in enumerate(batches(), 7):
            executors[0].feed(local.programs, number, values)
        ran = {s: f.result() for s, f in steps.items()}
    assert done == [0]
    for name, p in expected.named_parameters():
        assert torch.equal(weights[name].grad, p.grad), name
    for stage, step in ran.items():
        actions = [t.action for t in step.times]
        assert sorted(map(str, actions)) == sorted(map(str, schedule.ranks[stage]))
        for kinds in ({ActionKind.WEIGHT_BACKWARD}, set(ActionKind) - {ActionKind.WEIGHT_BACKWARD}):
            assert [a for a in actions if a.kind in kinds] == [a for a in schedule.ranks[stage] if a.kind in kinds]
        live = most = 0
        for a in actions:
            live += {ActionKind.FORWARD: 1, ActionKind.WEIGHT_BACKWARD: -1}.get(a.kind, 0)
            most = max(most, live)
        assert most <= schedule.room[stage]
