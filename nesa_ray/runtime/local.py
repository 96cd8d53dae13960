"""LocalPipeline: all stages of a plan in this process, for tests and notebooks: a split changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from nesa_ray.errors import InvalidConfig
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import StageModule, register, split, stage_links
from nesa_ray.planning.plan import Plan, topological_stages
from nesa_ray.planning.schedule import Action, RankOf, linearise, make_schedule
from nesa_ray.runtime.channel import LocalChannel, Mailbox
from nesa_ray.runtime.executor import Executor, Loss
from nesa_ray.runtime.link_codec import Encoder
from nesa_ray.runtime.weight_gradient import WeightGradients


class LocalPipeline(torch.nn.Module):
    """Callable like the module that was captured, with its parameters' names, and ordinary autograd.

    `state` replaces the captured weights (needed when the capture was on the meta device).
    """

    def __init__(self, captured: Captured, plan: Plan, state: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        weights = captured.weights(state)
        self._captured = captured
        self.programs = split(captured, plan.stage_of)
        self._stages = {p.id: StageModule(p, weights) for p in self.programs}
        self._graph = stage_links(self.programs)
        order = topological_stages(self._graph)
        assert order is not None
        self._order = order
        for stage in self._stages.values():
            for name, p in (*stage.named_parameters(), *stage.named_buffers()):
                register(self, name, p)
        held = self._weights()
        for alias, name in captured.aliases.items():
            register(self, alias, held[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed stage by stage; in training mode, random operators are seeded by torch's."""
        values = self._captured.flatten(args, kwargs)
        weights = self._weights()
        drawn = self.training and any(s.moded for s in self._stages.values())
        seed = int(torch.randint(1 << 62, ())) if drawn else None
        for s in self._order:
            stage = self._stages[s]
            made = stage.run(weights, *[values[a] for a in stage.program.arguments], seed=seed)
            values.update(zip(stage.program.returns, made, strict=True))
        return self._captured.unflatten(values)

    def step(
        self,
        microbatches: Sequence[Mapping[str, torch.Tensor]],
        loss: Loss,
        *,
        targets: Sequence[str] = (),
        schedule: str = "1f1b",
        seed: int = 0,
        recompute: Collection[int] = (),
        rank_of: RankOf | None = None,
        encoders: Mapping[int, Encoder] | None = None,
    ) -> list[torch.Tensor]:
        """One training step under a schedule: accumulates the mean loss's gradients into the parameters.

        Each micro-batch has the module's inputs and the loss's targets by name; `seed` is for the step's random
        operators, `recompute` the stages that compute a micro-batch again for its backward, `rank_of` the rank that
        runs each stage (with the schedule interleaved), `encoders` what each rank's messages go through, to the peers
        rank0, rank1, ....  Returns each micro-batch's loss.
        """
        if not microbatches:
            raise InvalidConfig("microbatches: needs at least one")
        final = next(p.id for p in self.programs if p.results)
        mailboxes: dict[str, Mailbox] = {}
        rank_of = rank_of or {p.id: p.id for p in self.programs}
        peers = {s: f"rank{r}" for s, r in rank_of.items()}
        weights = self._weights()
        executors: dict[int, Executor] = {}
        for rank in set(rank_of.values()):
            store = WeightGradients()
            # The modules of `forward` keep to ordinary autograd; these add weight gradients in place, as actors do.
            modules = {
                p.id: StageModule(p, weights, operators=store.operators) for p in self.programs if rank_of[p.id] == rank
            }
            executor = Executor(
                modules, LocalChannel(f"rank{rank}", mailboxes, (encoders or {}).get(rank)), peers, final,
                loss=loss, targets=targets, weight_gradients=store, recompute=recompute, timeout_s=0,
            )  # fmt: skip
            executors |= dict.fromkeys(modules, executor)
        for m, values in enumerate(microbatches):
            executors[final].feed(self.programs, m, values)
        losses: dict[int, torch.Tensor] = {}
        planned = make_schedule(schedule, self._graph, len(microbatches), rank_of=rank_of)
        actions: list[Action] = linearise(planned, self._graph)
        for run in actions:
            done = executors[run.stage].execute(run, len(microbatches), {run.stage: weights}, seed=seed)
            losses |= done.losses
        return [losses[m] for m in range(len(microbatches))]

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: t for s in self._stages.values() for n, t in (*s.named_parameters(), *s.named_buffers())}
