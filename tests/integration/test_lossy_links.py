"""Training and serving over a link that loses, reorders and stops for ten seconds: the results of a good one."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import namespaces
from benchmarks.emulated_hosts import EmulatedHosts, EmulatedLink
from nesa_ray.cluster.local import LocalNode
from nesa_ray.cluster.topology import Device, Link, Topology
from tests.integration.on_hosts import train_and_decode

VOCABULARY, STALL_S = 64, 10.0


@pytest.mark.skipif(bool(namespaces.unavailable()), reason=namespaces.unavailable())
def test_training_and_serving_over_a_lossy_link_that_stalls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (65,), generator=g).tolist() for _ in range(200)]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "train.parquet")
    nodes = [LocalNode(name=n, devices=1, memory_bytes=2e9, spare_cpus=2) for n in ("one", "two")]
    good, bad = Link(12.5e6, 0.005), EmulatedLink(12.5e6, 0.005, loss=0.01, reordering=0.05)
    with EmulatedHosts(nodes, link=good) as hosts:
        hosts.start_ray()
        devices = tuple(
            Device(id=f"{h}/cpu0", kind="cpu", node=h, memory_bytes=2e9, flops_per_s=1e11, cores=n.resolved_cores()[0])
            for h, n in hosts.nodes.items()
        )
        Topology(devices, default=good).to_json(tmp_path / "cluster.json")
        with hosts.start("one", train_and_decode, str(tmp_path)) as driver:
            driver.pipe.send(4)
            assert driver.pipe.recv() == "begun"
            losses, tokens = driver.pipe.recv()
            hosts.set_link("one", "two", bad)
            driver.pipe.send(4)
            assert driver.pipe.recv() == "begun"
            began = time.monotonic()
            hosts.stall("one", "two", STALL_S)
            again = driver.pipe.recv()
            took = time.monotonic() - began
    assert again == (losses, tokens)
    assert len(set(losses)) == 4
    assert all(len(t) == 24 for t in tokens)
    assert STALL_S < took < STALL_S + 60
