import itertools
import weakref
from pathlib import Path

import pytest
import torch

from nesa_ray.serving.pages import settle, zeros

CPU = torch.device("cpu")


def test_settled_tensors_are_the_same_side_by_side_in_their_order() -> None:
    torch.manual_seed(0)
    given = {
        "w": torch.randn(300, 70),
        "b": torch.randn(5).bfloat16(),
        "n": torch.arange(7),
        "q": torch.randint(-128, 127, (33, 65), dtype=torch.int8),
        "s": torch.tensor(3.0),
    }
    copies = {n: t.clone() for n, t in given.items()}
    settled = settle(dict(given))
    assert list(settled) == list(copies)
    for name, tensor in settled.items():
        assert torch.equal(tensor, copies[name])
        assert tensor.dtype == copies[name].dtype
        assert tensor.data_ptr() % 64 == 0
    places = [t.data_ptr() for t in settled.values()]
    sizes = [-(-t.nbytes // 64) * 64 for t in settled.values()]
    assert [b - a for a, b in itertools.pairwise(places)] == sizes[:-1]
    assert places[0] % (1 << 21) == 0


def test_what_shares_memory_or_has_holes_stays() -> None:
    whole = torch.randn(8, 8)
    state = {
        "a": whole,
        "b": whole,
        "row": torch.randn(4, 6)[1],
        "holes": torch.randn(4, 6)[:, :2],
        "none": torch.empty(0),
    }
    places = {n: t.data_ptr() for n, t in state.items()}
    settled = settle(dict(state))
    assert {n for n, t in settled.items() if t.data_ptr() != places[n]} == {"row"}
    assert all(torch.equal(settled[n], t) for n, t in state.items())
    assert settled["a"].data_ptr() == settled["b"].data_ptr()


def test_a_tensor_is_let_go_as_it_is_moved() -> None:
    state = {"w": torch.randn(64, 64)}
    old = weakref.ref(state["w"])
    settle(state)
    assert old() is None


def test_a_state_without_tensors_is_settled() -> None:
    assert settle({}) == {}


def test_zeros_are_writable_and_begin_a_huge_page() -> None:
    x = zeros((3, 5), torch.bfloat16, CPU)
    assert x.shape == (3, 5)
    assert not bool(x.any())
    assert x.data_ptr() % (1 << 21) == 0
    x += 1
    assert float(x.sum()) == 15
    assert zeros((0, 5), torch.float32, CPU).numel() == 0
    assert zeros((2,), torch.float32, torch.device("meta")).is_meta


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a kernel without huge pages")
def test_huge_pages_are_asked_for() -> None:
    x = zeros((1 << 20,), torch.float32, CPU)
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            begin, end = (int(n, 16) for n in head.split("-"))
            inside = begin <= x.data_ptr() < end
        elif inside and head == "VmFlags:":
            flags = line
    assert " hg" in flags
