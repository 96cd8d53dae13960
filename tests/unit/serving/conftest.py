"""Tiny models of several families on disk, cut at arbitrary nodes, served by stages in this process."""

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import StageProgram, split
from nesa_ray.planning.plan import Plan, Stage
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.serving.api import application
from nesa_ray.serving.blueprint import capture_served, draw
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.rows import frozen
from nesa_ray.serving.stages import LocalStages

VOCABULARY = 320
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL),
    "qwen3": ("Qwen3Config", {**_SMALL, "head_dim": 24}),
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": 11}),
    "gemma2": ("Gemma2Config", {**_SMALL, "head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 16}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)  # the forms that the tests of single passes look at
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2Config", _SMALL),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "phi3": ("Phi3Config", _SMALL),
    "cohere": ("CohereConfig", _SMALL),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": 4, "sliding_window": None}),
}
MORE_FAMILIES = (*FAMILIES, *_MORE)
WITH_TOKENIZER = ("qwen3",)
_CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_CHAT)


@dataclass(frozen=True)
class Model:
    """A tiny model on disk, and the same in transformers."""

    directory: Path
    reference: Any

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """What transformers generates greedily."""
        ids = torch.tensor([prompt])
        out = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return out[0, len(prompt) :].tolist()


def cut(captured: Captured, *shares: float) -> Plan:
    """A plan that cuts the captured order at these shares of its nodes."""
    n = len(captured.node_id)
    at = [0, *(int(n * s) for s in shares), n]
    stages = tuple(
        Stage(id=i, devices=(f"cpu{i}",), nodes=tuple(range(a, b))) for i, (a, b) in enumerate(itertools.pairwise(at))
    )
    return Plan(objective="throughput", stages=stages, bottleneck_s=0.0, latency_s=0.0, lower_bound_s=0.0)


def whole(captured: Captured, directory: str, dtype: torch.dtype) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """The model as one stage."""
    (program,) = split(captured, dict.fromkeys(captured.node_id.values(), 0))
    constants = {n: t for n, t in captured.state.items() if not t.is_meta}
    names = [n for n in program.state if n not in constants]
    return frozen(program), {**load_state(directory, names, dtype=dtype), **constants}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several stages share this process: more threads each would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Makes a family's tiny model, once."""
    made: dict[str, Model] = {}

    def make(family: str) -> Model:
        if family not in made:
            kind, options = {**_FAMILIES, **_MORE}[family]
            config = getattr(transformers, kind)(**options)
            torch.manual_seed(7)
            reference = AutoModelForCausalLM.from_config(config).eval()
            directory = tmp_path_factory.mktemp(family)
            reference.save_pretrained(directory)
            if family in WITH_TOKENIZER:
                byte_tokenizer().save_pretrained(directory)
            made[family] = Model(directory, reference)
        return made[family]

    return make


@pytest.fixture(scope="session")
def captured() -> Callable[[ServeConfig], Captured]:
    """Captures a served model, once for each directory and kind of weights."""
    made: dict[tuple[str, str], Captured] = {}

    def make(config: ServeConfig) -> Captured:
        key = (config.model, config.weights)
        if key not in made:
            made[key] = capture_served(config)
        return made[key]

    return make


def start(model: Model, captured: Callable[[ServeConfig], Captured], *shares: float, **options: Any) -> Engine:
    """An engine over stages in this process."""
    config = ServeConfig(model=str(model.directory), **{"block_size": 4, "max_sequences": 8, **options})
    graph = captured(config)
    blueprint = draw(config, graph, cut(graph, *(shares or (0.55,))))
    return Engine(config, blueprint=blueprint, stages=LocalStages(blueprint))


@pytest.fixture
def serve(
    model: Callable[[str], Model], captured: Callable[[ServeConfig], Captured]
) -> Iterator[Callable[..., Engine]]:
    """serve(family, *shares, **config): an engine over stages in this process; closed at the end of the test."""
    engines: list[Engine] = []

    def make(family: str, *shares: float, **options: Any) -> Engine:
        engines.append(start(model(family), captured, *shares, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@contextmanager
def listening(engine: Engine) -> Iterator[int]:
    """The application on a port of this machine, served by uvicorn as Ray Serve's proxy does."""
    config = uvicorn.Config(
        application(lambda: engine, engine.config), port=0, log_level="error", timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
