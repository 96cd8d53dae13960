"""`nesa-ray demo`: the main job on one machine.  A story in six steps; each calls what a user would call.

Two emulated nodes share this machine's cores: `big`, and `small`, whose stages get a smaller share of them and half
the memory.  The decoder is a Llama of about 10 million parameters; the corpus is Python's standard library.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nesa_ray.report import telling

VOCABULARY, SEQUENCE_LENGTH = 4096, 128
STEPS_PER_SECOND = 1.1  # about what two cores do; the time limit ends the run on slower ones
PROMPT = "def read(self, size=-1):\n    "

console = Console(highlight=False, soft_wrap=True)


def run(out: Path, train_seconds: float) -> None:
    """Runs the demo; its results lie in `out`: plan.json, metrics.jsonl, model/, completion.txt."""
    out = out.resolve()
    corpus = _corpus(out)
    from nesa_ray.cluster.local import LocalCluster, LocalNode

    cores = sorted(os.sched_getaffinity(0))[:2]
    pair = tuple((c,) for c in itertools.islice(itertools.cycle(cores), 2))
    nodes = [
        LocalNode(name="big", devices=2, cores=pair, memory_bytes=1e9, spare_cpus=2),
        LocalNode(name="small", devices=2, cores=pair, memory_bytes=0.5e9, niceness=4),
    ]
    with telling("starting a local Ray cluster of two unequal nodes"):
        cluster = LocalCluster(nodes)
        cluster.__enter__()
    try:
        _train(out, corpus, train_seconds)
        _serve(out)
    finally:
        with telling("stopping the cluster"):
            cluster.__exit__(None, None, None)


def _corpus(out: Path) -> Any:
    from nesa_ray.training.corpus import make_corpus, token_ids, unigram_entropy_nats

    _step(1, "a real corpus: the source of Python's standard library")
    corpus = make_corpus(out / "corpus", vocab_size=VOCABULARY)
    vocabulary, eos = token_ids(corpus.tokenizer)
    entropy = unigram_entropy_nats(corpus.held_out_tokens, corpus.train_tokens, vocab_size=vocabulary, eos_token_id=eos)
    console.print(f"{corpus.train_tokens}\nheld-out unigram entropy {entropy:.3f} nats per token")
    return corpus, entropy


def _train(out: Path, corpus_and_entropy: Any, train_seconds: float) -> None:
    from transformers import LlamaConfig

    from nesa_ray.cluster.joining import connect
    from nesa_ray.report import plan_table, topology_table, training_table, write
    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer

    corpus, entropy = corpus_and_entropy
    _step(2, "capture a Llama-style decoder on the meta device, measure the cluster, cut the graph for it")
    LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.06, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ).save_pretrained(out / "config")  # fmt: skip
    settings = TrainConfig.from_dict(
        {
            "model": str(out / "config"),
            "data": {"paths": [str(corpus.train_tokens)], "sequence_length": SEQUENCE_LENGTH},
            "held_out": [str(corpus.held_out_tokens)],
            "tokenizer": str(corpus.tokenizer),
            "output": str(out),
            "stages": 2,
            "replicas": 2,
            "zero": 2,
            "micro_batch_size": 2,
            "microbatches": 4,
            "steps": max(4, round(train_seconds * STEPS_PER_SECOND)),
            "max_seconds": train_seconds,
            "warmup_steps": 10,
            "eval_every": 40,
            "timeline": 3,
            "optimizer": {"lr": 2e-3},
        }
    )
    with telling("joining the cluster, capturing, measuring, planning, starting four stage actors"):
        connect()
        trainer = Trainer(settings)
    with trainer:
        write(topology_table(trainer.topology))
        write(plan_table(trainer.plan, trainer.captured.graph, trainer.topology))
        _step(3, "train: 2 pipeline stages x 2 replicas, ZeRO-2 across each stage's replicas")
        result = trainer.fit()
        write(training_table(result))
        console.print(f"held-out loss {result.held_out_loss:.3f} against a unigram entropy of {entropy:.3f}")
        _step(4, "the saved model, loaded by transformers, has the trainer's held-out loss")
        with telling("evaluating with AutoModelForCausalLM.from_pretrained"):
            loaded = held_out_loss(result.model, trainer)
        console.print(f"trainer {result.held_out_loss:.6f}   transformers {loaded:.6f}")
        if result.held_out_loss is None or not math.isclose(loaded, result.held_out_loss, rel_tol=1e-4):
            raise AssertionError(f"the loaded model's held-out loss is {loaded}, the trainer's {result.held_out_loss}")


def held_out_loss(model: str, trainer: Any) -> float:
    """The held-out loss of a saved model, over the windows that the trainer evaluates on."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from nesa_ray.training.data import held_out_batches

    c = trainer.config
    logging.disable_progress_bar()
    whole = AutoModelForCausalLM.from_pretrained(model)
    batches = held_out_batches(
        c.held_out, c.data.sequence_length, batch_size=c.micro_batch_size, max_windows=c.eval_windows,
        vocab_size=whole.config.vocab_size, eos_token_id=whole.config.eos_token_id,
    )  # fmt: skip
    losses = []
    with torch.no_grad():
        for batch in batches:
            logits = whole(input_ids=torch.from_numpy(batch.input_ids_BT)).logits
            labels = torch.from_numpy(batch.labels_BT)
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    return float(torch.stack(losses).mean())


def _serve(out: Path) -> None:
    import yaml
    from openai import OpenAI
    from ray import serve

    from nesa_ray.cluster.local import free_ports
    from nesa_ray.serving.config import ServeConfig
    from nesa_ray.serving.ingress import deployment

    _step(5, "serve it as a pipeline, and complete a prompt through the openai client")
    (out / "serve.yaml").write_text(yaml.safe_dump({"model": "model", "name": "demo", "stages": 2}))
    (port,) = free_ports(1)
    with telling("deploying the pipelined application with Ray Serve"):
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(ServeConfig.from_yaml(out / "serve.yaml")), name="llm")
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        console.print(PROMPT, end="", style="bold", markup=False)
        began, text, pieces = time.monotonic(), "", 0
        for event in client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=64, temperature=0.7, seed=0, stream=True
        ):
            piece = event.choices[0].text if event.choices else ""
            console.print(piece, end="", markup=False)
            text, pieces = text + piece, pieces + bool(piece)
        took = time.monotonic() - began
        (out / "completion.txt").write_text(PROMPT + text + "\n")
        console.print(f"\n\n{pieces} pieces in {took:.2f} s; results are in {out}")
    finally:
        with telling("ending the application"):
            serve.delete("llm")


def _step(number: int, title: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/bold]")
