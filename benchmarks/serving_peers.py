"""Peers of serve_llm.py, each in a process of its own with two threads: transformers' two ways, and llama.cpp.

Each `..._peer(directory, dtype)` loads the model and returns a function that answers a Work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """One request: token ids in, so many out, greedy."""

    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Work:
    """Requests, of which up to `concurrency` are under way, each from its arrival on (seconds; None: all at once)."""

    requests: tuple[Load, ...]
    concurrency: int
    arrivals: tuple[float, ...] | None = None

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(r.output_tokens for r in self.requests)

    def arrival(self, request: int) -> float:
        """Seconds after the beginning."""
        return self.arrivals[request] if self.arrivals else 0.0

    def asked(self, request: int, taken: float) -> float:
        """When it was asked, for one that was taken up then: its arrival; in a closed loop, that very moment."""
        return self.arrivals[request] if self.arrivals else taken

    def arrived(self, request: int, now: float) -> bool:
        """Whether there is such a request, and it has come by now."""
        return request < len(self.requests) and self.arrival(request) <= now


@dataclass
class Answers:
    """What an arm made of a Work; seconds count from its beginning, a first token's from when it was asked."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    stages: dict[str, Any] = field(default_factory=dict)


Peer = Callable[[Work], Answers]


def static_peer(directory: Path, dtype: torch.dtype) -> Peer:
    """transformers' `generate` on batches of those that wait, padded on the left; each runs to its longest output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0

    def answer(work: Work) -> Answers:
        answers, began, at = Answers(), time.perf_counter(), 0
        while at < len(work.requests):
            time.sleep(max(0.0, work.arrival(at) - (time.perf_counter() - began)))
            now, size = time.perf_counter() - began, 0
            while size < work.concurrency and work.arrived(at + size, now):
                size += 1
            batch = work.requests[at : at + size]
            longest = max(len(r.prompt) for r in batch)
            ids = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in batch])
            mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
            tokens = max(r.output_tokens for r in batch)
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
                )
            for i, r in enumerate(batch):
                answers.tokens[at + i] = out[i, longest : longest + r.output_tokens].tolist()
            at += size
        answers.wall_s = time.perf_counter() - began
        return answers

    return answer


def continuous_peer(directory: Path, dtype: torch.dtype) -> Peer:
    """transformers' own continuous batching."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="paged|sdpa").eval()
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def answer(work: Work) -> Answers:
        answers = Answers()
        config = ContinuousBatchingConfig(
            page_size=32, num_blocks=1024, max_batch_tokens=256, max_requests_per_batch=work.concurrency,
            allow_block_sharing=False,
        )  # fmt: skip
        with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
            began, sent = time.perf_counter(), 0
            while len(answers.tokens) < len(work.requests):
                while work.arrived(sent, time.perf_counter() - began):
                    r = work.requests[sent]
                    manager.add_request(list(r.prompt), request_id=str(sent), max_new_tokens=r.output_tokens)
                    sent += 1
                done = manager.get_result(timeout=0.01)
                if done is not None:
                    if done.error:
                        raise RuntimeError(done.error)
                    answers.tokens[int(done.request_id)] = list(done.generated_tokens)
            answers.wall_s = time.perf_counter() - began
        return answers

    return answer


def llama_cpp_peer(directory: Path, dtype: torch.dtype, threads: int = 2, context: int = 512) -> Peer:
    """llama.cpp through its batch API: a sequence for each request under way, a batch of all their next tokens, and of
    prompts as far as 512 tokens go, as its own server fills it.  Prompts' chunks and outputs share batches.
    """
    import llama_cpp as ll

    ll.llama_backend_init()
    quiet = ll.llama_log_callback(lambda level, text, _: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    gguf_path = directory / f"{dtype}.gguf"
    params = ll.llama_model_default_params()
    model = ll.llama_model_load_from_file(str(gguf_path).encode(), params)
    if not model:
        raise RuntimeError(f"{gguf_path}: llama.cpp can't load it")
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def answer(work: Work, keep: Any = quiet) -> Answers:
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * work.concurrency, work.concurrency
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        if dtype is torch.float32:
            params.type_k = params.type_v = 0
        state = ll.llama_init_from_model(model, params)
        batch = ll.llama_batch_init(512, 0, 1)
        try:
            return _batches(ll, state, batch, vocabulary, work)
        finally:
            ll.llama_batch_free(batch)
            ll.llama_free(state)

    return answer


def _batches(ll: Any, state: Any, batch: Any, vocabulary: int, work: Work) -> Answers:
    answers, began, taken = Answers(), time.perf_counter(), 0
    slots: list[int | None] = [None] * work.concurrency
    done: dict[int, int] = {}  # tokens of a request that the cache holds
    asked: dict[int, float] = {}
    memory = ll.llama_get_memory(state)
    while done or taken < len(work.requests):
        now = time.perf_counter() - began
        for s, request in enumerate(slots):
            if request is None and work.arrived(taken, now):
                slots[s], done[taken], answers.tokens[taken], asked[taken] = taken, 0, [], work.asked(taken, now)
                taken += 1
        if not done:
            time.sleep(max(0.0, work.arrival(taken) - now))
            continue
        n, sampled = 0, []
        under_way = [(request, s) for s, request in enumerate(slots) if request is not None]
        for request, s in sorted(under_way, key=lambda u: not answers.tokens[u[0]]):  # those that decode come first
            tokens = [*work.requests[request].prompt, *answers.tokens[request]]
            some = tokens[done[request] :][: 512 - n]
            for token in some:
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, done[request], 1
                batch.seq_id[n][0], batch.logits[n] = s, 0
                done[request] += 1
                n += 1
            if some and done[request] == len(tokens):
                batch.logits[n - 1] = 1
                sampled.append((n - 1, s, request))
        batch.n_tokens = n
        if ll.llama_decode(state, batch):
            raise RuntimeError("llama_decode failed")
        for at, s, request in sampled:
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(state, at), shape=(vocabulary,))
            answers.tokens[request].append(int(logits.argmax()))
            made = len(answers.tokens[request])
            if made == 1:
                answers.first_token_s.append(time.perf_counter() - began - asked[request])
            if made == work.requests[request].output_tokens:
                ll.llama_memory_seq_rm(memory, s, -1, -1)
                slots[s] = None
                del done[request]
    answers.wall_s = time.perf_counter() - began
    return answers


def write_gguf(directory: Path, dtype: torch.dtype) -> None:
    """The Llama in `directory` as llama.cpp reads it: q and k with each head's halves of RoPE interleaved."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    c = model.config
    writer = gguf.GGUFWriter(directory / f"{dtype}.gguf", "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.F32 if dtype is torch.float32 else gguf.GGMLQuantizationType.BF16

    def add(name: str, weight: Tensor) -> None:
        values = weight.detach().numpy()
        if values.ndim == 1 or dtype is torch.float32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    add("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": _interleaved(attention.q_proj.weight, c.num_attention_heads),
            "attn_k": _interleaved(attention.k_proj.weight, c.num_key_value_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        for name, weight in parts.items():
            add(f"blk.{i}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def agreement(a: Answers, b: Answers, tokens: int = 8) -> float:
    """The share of requests whose first tokens are the same: equal weights give almost 1 (near ties may differ)."""
    same = [a.tokens[r][:tokens] == b.tokens[r][:tokens] for r in a.tokens]
    return sum(same) / len(same)


def has_llama_cpp() -> bool:
    """Whether the optional packages are there."""
    return all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


PEERS: dict[str, Callable[[Path, torch.dtype], Peer]] = {
    "transformers, static batches": static_peer,
    "transformers, continuous batching": continuous_peer,
    "llama.cpp": llama_cpp_peer,
}
