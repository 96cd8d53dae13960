"""Tokens from the stage that chooses them to those that read them."""

import threading

import pytest
import torch

from nesa_ray.errors import Timeout
from nesa_ray.runtime.channel import Kind, LocalChannel, Mailbox, Tag
from nesa_ray.serving.choices import CHOSEN, Choices
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence, Work
from nesa_ray.serving.step import Step, pack_step


def step(slots: list[int], *, ahead: int = 0, samples: bool = True) -> Step:
    """A step with a token of each slot, the slot's number plus 100; those of the first ones are still being chosen."""
    known = [Sequence(0, [s + 100], 1, Sampling(), 0, 9, blocks=[s], slot=s) for s in slots]
    work = [Work(s, int(i < ahead), 1, samples, ahead=i < ahead) for i, s in enumerate(known)]
    return Step.unpack(pack_step(work, 4))


def test_a_step_ahead_waits_for_its_own_tokens_and_no_longer() -> None:
    boxes: dict[str, Mailbox] = {}
    last, choices = LocalChannel("last", boxes), Choices(LocalChannel("first", boxes))

    def chosen(index: int, *tokens: float) -> None:
        last.send("first", Tag(Kind.CONTROL, CHOSEN, index), torch.tensor([[t, float("nan")] for t in tokens]))

    assert choices.tokens(0, step([2, 0])).tolist() == [102, 100]
    assert choices.tokens(1, step([1])).tolist() == [101]
    assert choices.tokens(2, step([2], samples=False)).tolist() == [102]
    threading.Timer(0.05, chosen, (0, 7, 8)).start()
    assert choices.tokens(3, step([0, 2], ahead=2)).tolist() == [8, 7]  # though step 1 hasn't chosen yet
    chosen(1, 5)
    chosen(3, 20, 21)
    assert choices.tokens(4, step([2, 1, 0, 9], ahead=3)).tolist() == [21, 5, 20, 109]
    assert choices.tokens(5, step([1])).tolist() == [101]
    chosen(4, 1, 2, 3, 4)
    chosen(5, 4)
    assert choices.tokens(6, step([1], ahead=1)).tolist() == [4]
    assert not boxes["first"]._arrived


def test_a_token_that_never_comes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = LocalChannel("first", {})
    take = channel.recv
    monkeypatch.setattr(channel, "recv", lambda tag, timeout_s=None: take(tag, 0.05))
    choices = Choices(channel)
    choices.tokens(0, step([0]))
    with pytest.raises(Timeout, match="chosen"):
        choices.tokens(1, step([0], ahead=1))
