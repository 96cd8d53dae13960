"""Adapters of one base served together: as peft computes each alone, token for token."""

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from nesa_ray.errors import InvalidConfig, UnknownModel
from nesa_ray.graph.capture import Captured
from nesa_ray.runtime.adapter_files import SETTINGS, TENSORS, read_adapter
from nesa_ray.serving.adapters import Site, StageAdapters
from nesa_ray.serving.api import application
from nesa_ray.serving.blueprint import draw
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence, Work
from nesa_ray.serving.step import Step, pack_step
from nesa_ray.training.lora import LoraConfig, write_adapter
from tests.unit.serving.conftest import Model, byte_tokenizer, cut, start
from tests.unit.serving.test_engine import prompts

Serve = Callable[..., Engine]
Adapted = Callable[[str], dict[str, Model]]
NAMES = (None, "narrow", "wide")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
WIDE = {"llama": ALL, "qwen3": ALL, "gpt2": ["c_attn", "c_fc", "c_proj", "lm_head"]}  # gpt2's head is tied


def save_trained(base: Any, directory: Path, targets: tuple[str, ...], rank: int) -> None:
    """As our training saves an adapter."""
    tensors, g = {}, torch.Generator().manual_seed(rank)
    for path, layer in base.named_modules():
        if path.endswith(targets):
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=g) / 8
            tensors[f"{path}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=g) / 8
    directory.mkdir()
    save_file(tensors, directory / "part.safetensors")
    config = LoraConfig(rank=rank, alpha=2.5 * rank, target_modules=targets)
    write_adapter(directory, [directory / "part.safetensors"], config, base=None, task="CAUSAL_LM")


def save_pefts(base: Any, directory: Path, targets: list[str], rank: int, **options: Any) -> None:
    """As peft saves one."""
    config = peft.LoraConfig(
        r=rank, target_modules=targets, lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(directory, save_embedding_layers=False)
    settings = json.loads((directory / SETTINGS).read_text())
    (directory / SETTINGS).write_text(json.dumps({**settings, "init_lora_weights": True}))


@pytest.fixture(scope="module")
def adapted(model: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """family -> name -> the adapter's directory, and peft's model; "" is the base."""
    made: dict[str, dict[str, Model]] = {}

    def make(family: str) -> dict[str, Model]:
        if family not in made:
            base, directory = model(family).reference, tmp_path_factory.mktemp("adapters")
            save_pefts(base, directory / "wide", WIDE[family], 6, lora_alpha=5, use_rslora=True)
            if family == "gpt2":
                save_pefts(base, directory / "narrow", ["c_attn"], 2, lora_alpha=5, fan_in_fan_out=True)
            else:
                save_trained(base, directory / "narrow", ("q_proj", "v_proj", "layers.1.mlp.down_proj"), 3)
            made[family] = {"": model(family)} | {
                n: Model(directory / n, peft.PeftModel.from_pretrained(copy.deepcopy(base), directory / n).eval())
                for n in ("narrow", "wide")
            }
        return made[family]

    return make


def directories(models: dict[str, Model]) -> dict[str, str]:
    return {n: str(m.directory) for n, m in models.items() if n}


def together(engine: Engine, texts: list[list[int]], tokens: int) -> list[list[int]]:
    """Base and adapters by turns."""
    with ThreadPoolExecutor(len(texts)) as pool:
        work = [
            pool.submit(engine.generate, t, model=NAMES[i % 3], max_tokens=tokens, temperature=0)
            for i, t in enumerate(texts)
        ]
        return [list(w.result(timeout=60).token_ids) for w in work]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_of_base_and_adapters_equals_pefts_generate(family: str, serve: Serve, adapted: Adapted) -> None:
    models, texts = adapted(family), prompts(12, seed=8, low=6)
    expected = [models[NAMES[i % 3] or ""].generate(t, 12) for i, t in enumerate(texts)]
    assert models[""].generate(texts[1], 12) != expected[1]
    assert models[""].generate(texts[2], 12) != expected[2]
    block_bytes = 3 * 2 * (4 if family == "gpt2" else 2) * 16 * 4 * 4
    crowded = {"cache_bytes": 32 * block_bytes, "context": 80, "max_batch_tokens": 9, "batches_in_flight": 3}
    for shares, options in (((0.0001,), {}), ((0.3, 0.55), {}), ((0.97,), crowded)):
        engine = serve(family, *shares, adapters=directories(models), max_sequences=12, **options)
        assert together(engine, texts, 12) == expected
        assert bool(options) == (engine.scheduler.preemptions > 0)
        assert engine.stats()["free_blocks"] == engine.blueprint.blocks
        held = [set(w._adapters.layers) for w in engine._stages.workers]  # type: ignore[attr-defined]
        assert len(set.union(*held)) == sum(map(len, held)) == 3 * (4 if family == "gpt2" else 7) + 1


def test_a_prefix_is_shared_within_an_adapter_alone(serve: Serve, adapted: Adapted) -> None:
    models = adapted("llama")
    engine = serve("llama", adapters=directories(models))
    text = prompts(1, seed=9, low=30)[0]
    for cached in (0, (len(text) - 1) // 4 * 4):
        for name in NAMES:
            got = engine.generate(text, model=name, temperature=0, max_tokens=6)
            assert list(got.token_ids) == models[name or ""].generate(text, 6)
            assert got.cached_tokens == cached


def test_embeddings_of_an_adapter(serve: Serve, adapted: Adapted) -> None:
    models = adapted("llama")
    engine = serve("llama", 0.3, 0.9, adapters=directories(models), max_batch_tokens=16)
    text = prompts(1, seed=3, low=30)[0]
    vectors = {}
    for name in NAMES:
        with torch.no_grad():
            out = models[name or ""].reference(input_ids=torch.tensor([text]), output_hidden_states=True)
        vectors[name] = engine.embed(text, model=name)
        torch.testing.assert_close(vectors[name], out.hidden_states[-1][0].mean(0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(vectors[None], vectors["narrow"], atol=1e-2)


@pytest.fixture
def client(
    model: Callable[[str], Model], captured: Callable[[ServeConfig], Captured], adapted: Adapted
) -> Iterator[openai.OpenAI]:
    with start(model("qwen3"), captured, name="tiny", adapters=directories(adapted("qwen3"))) as engine:
        with pytest.raises(UnknownModel):
            engine.generate([1], model="wid")
        http = TestClient(application(lambda: engine, engine.config))
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


def test_the_endpoint_serves_adapters_by_name(client: openai.OpenAI, adapted: Adapted) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "narrow", "wide"]
    assert client.models.retrieve("wide").parent == "tiny"  # type: ignore[attr-defined]
    tokenizer, texts = byte_tokenizer(), {}
    for name in ("tiny", "narrow", "wide"):
        expected = adapted("qwen3")["" if name == "tiny" else name]
        options = {"model": name, "temperature": 0}
        done = client.completions.create(prompt="The cat", max_tokens=9, **options)
        assert done.model == name
        assert done.choices[0].text == tokenizer.decode(expected.generate(tokenizer.encode("The cat"), 9))
        messages = [{"role": "user", "content": "Hi"}]
        chunks = list(client.chat.completions.create(messages=messages, max_tokens=9, stream=True, **options))
        texts[name] = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert texts[name] == tokenizer.decode(expected.generate(tokenizer.encode("<user>Hi<bot>"), 9))
        assert {c.model for c in chunks} == {name}
        assert client.embeddings.create(model=name, input="sat").model == name
    assert len(set(texts.values())) == 3
    with pytest.raises(openai.NotFoundError, match="'wid' isn't served here; 'tiny', 'narrow', 'wide' are"):
        client.completions.create(model="wid", prompt="a")


@pytest.mark.parametrize("numbers", [[0, 0, 0], [2, 2, 2], [1, 0, 3], [3, 1, 1], [1, 2, 3], [0, 2, 0]])
def test_each_row_gets_its_own_adapters_product(
    numbers: list[int], tmp_path: Path, model: Callable[[str], Model]
) -> None:
    base, layer = model("llama").reference, "model.layers.0.self_attn.q_proj"
    for rank, targets in ((1, ("q_proj",)), (4, ("q_proj", "v_proj")), (3, ("q_proj",))):
        save_trained(base, tmp_path / str(rank), targets, rank)
    adapters = [read_adapter(tmp_path / str(rank), "test") for rank in (1, 4, 3)]
    own = [a.load([layer], torch.float32, torch.device("cpu"))[layer] for a in adapters]
    one = StageAdapters(
        adapters,
        {"all": Site(layer, False), "rows": Site(layer, True), "v": Site("model.layers.0.self_attn.v_proj", False)},
        torch.float32,
        torch.device("cpu"),
    )
    work = [
        Work(Sequence(i, [0] * 5, 5, Sampling(), 0, 1, blocks=[i], adapter=n), 0, count, samples)
        for i, (n, count, samples) in enumerate(zip(numbers, (5, 1, 3), (True, False, True), strict=True))
    ]
    step = Step.unpack(pack_step(work, 8))
    one.set(step)
    g = torch.Generator().manual_seed(0)
    x_TI, wide_TP = torch.randn(1, 9, 64, generator=g), torch.randn(1, 9, 150, generator=g)
    owners = [n for n, w in zip(numbers, work, strict=True) for _ in range(w.count)]
    for site, rows in (("all", list(range(9))), ("rows", step.rows_R.tolist())):
        x, wide = x_TI[:, rows], wide_TP[:, rows]
        before = wide.clone()
        got = one.bind(site)(wide[..., 40:104], x)
        assert got.data_ptr() == wide[..., 40:].data_ptr()
        assert torch.equal(wide[..., :40], before[..., :40])
        assert torch.equal(wide[..., 104:], before[..., 104:])
        for i, row in enumerate(rows):
            a_rI, b_Or = own[owners[row] - 1] if owners[row] else (torch.zeros(1, 64), torch.zeros(64, 1))
            torch.testing.assert_close(got[0, i], before[0, i, 40:104] + b_Or @ (a_rI @ x[0, i]))
            assert owners[row] or torch.equal(got[0, i], before[0, i, 40:104])


def changed(directory: Path, settings: dict[str, Any], rename: Callable[[str], str] = str) -> None:
    path = directory / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    save_file({rename(n): t for n, t in load_file(directory / TENSORS).items()}, directory / TENSORS)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / SETTINGS).unlink(), "no adapter_config.json there"),
        (lambda d: (d / TENSORS).unlink(), "no adapter_model.safetensors there"),
        (lambda d: (d / SETTINGS).write_text("{"), "not JSON"),
        (lambda d: (d / SETTINGS).write_text("[]"), "needs a JSON object"),
        (lambda d: (d / TENSORS).write_bytes(b"nothing"), "can't be read"),
        (lambda d: save_file({}, d / TENSORS), "is empty"),
        (lambda d: changed(d, {"peft_type": "IA3"}), "peft_type: needs LORA, got 'IA3'"),
        (lambda d: changed(d, {"use_dora": True}), "use_dora: only plain LoRA is served"),
        (lambda d: changed(d, {"bias": "all"}), "bias: only plain LoRA is served, needs this to be off, got all"),
        (lambda d: changed(d, {"modules_to_save": ["lm_head"]}), "modules_to_save: only plain LoRA"),
        (lambda d: changed(d, {"rank_pattern": {"q_proj": 4}}), "rank_pattern: only plain LoRA"),
        (lambda d: changed(d, {"init_lora_weights": "pissa"}), "init_lora_weights: 'pissa' changes the base's"),
        (lambda d: changed(d, {"r": 4}), "needs lora_A [4, in] and lora_B [out, 4], has [3, 64] and [64, 3]"),
        (lambda d: changed(d, {"lora_alpha": "x"}), "lora_alpha: needs a number"),
        (
            lambda d: changed(d, {}, lambda n: n.replace("lora_A.weight", "lora_embedding_A")),
            "lora_embedding_A isn't the lora_A or lora_B of a linear layer",
        ),
        (
            lambda d: changed(d, {}, lambda n: n.replace("self_attn.q_proj", "self_attn.q_prj")),
            "model.layers.0.self_attn.q_prj: isn't a linear layer of the model (did you mean 'model.layers.0.self_attn",
        ),
        (
            lambda d: changed(d, {}, lambda n: n.replace("self_attn.q_proj", "input_layernorm")),
            "input_layernorm: isn't a linear layer of the model",
        ),
        (
            lambda d: changed(d, {}, lambda n: n.replace("self_attn.q_proj", "self_attn.k_proj")),
            "model.layers.0.self_attn.k_proj: maps 64 numbers to 32, but the adapter is made for 64 to 64",
        ),
    ],
)
def test_a_directory_that_cant_be_served_is_refused_in_one_line(
    spoil: Callable[[Path], object],
    says: str,
    tmp_path: Path,
    model: Callable[[str], Model],
    captured: Callable[[ServeConfig], Captured],
) -> None:
    save_trained(model("llama").reference, tmp_path / "sql", ("q_proj",), 3)
    config = ServeConfig(model=str(model("llama").directory), adapters={"sql": str(tmp_path / "sql")})
    graph = captured(config)
    draw(config, graph, cut(graph, 0.5))
    spoil(tmp_path / "sql")
    with pytest.raises(InvalidConfig) as e:
        draw(config, graph, cut(graph, 0.5))
    assert says in str(e.value)
    assert str(tmp_path) in str(e.value) or "serve: adapters.sql: " in str(e.value)
    assert "\n" not in str(e.value)
