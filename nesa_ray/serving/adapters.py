"""LoRA adapters over one base, several in one batch: each row of a product gets what its own adapter adds.

The base's product is computed as it ever is; what makes it doesn't matter, so it may be packed, or a slice of several
computed as one.  To it is added, for all rows at once, B A x with the A and B of all adapters of the step side by side,
scaled, and what isn't a row's own adapter's blanked in between: two products, however many adapters there are.
(Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, group the rows by adapter.  With as few as a step has here, the
groups cost more: one core, 16 rows, 4 adapters of rank 16, 768 x 768: 41 us in float32 and 39 in bfloat16 against 53
and 160.)

Adapters are numbered from 1; rows of number 0 are the base's alone.
Shapes: T tokens of the step, R rows whose results are wanted, N sequences, I and O widths of a layer, W ranks of
several adapters together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import nearest
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import STATE, Instruction, Ref, StageProgram
from nesa_ray.runtime.adapter_files import Adapter, read_adapter
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.rows import Served, rows_are_tokens, token_dimension
from nesa_ray.serving.step import Step

ADAPTERS = "nesa.adapters"  # (product, input) -> the product with what adapters add, in place
_PRODUCTS = {"aten.linear.default": (0, 1), "aten.addmm.default": (1, 2)}  # places of the input and of the weight
_SUFFIX = "__base"
# Which of a layer's ranks a step needs, and where one isn't the row's own adapter's, [T, W]; None: nowhere.
_Need = tuple[slice | torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Site:
    """A product that adapters add to: its layer's name in the module; `selected`: it has the rows of ROWS alone."""

    layer: str
    selected: bool


def configured(config: ServeConfig) -> dict[str, Adapter]:
    """The configured adapters by name, in the order of their numbers.  Raises InvalidConfig."""
    return {n: read_adapter(Path(d).resolve(), f"serve: adapters.{n}") for n, d in config.adapters.items()}


def find_sites(captured: Captured, served: Served, adapters: Mapping[str, Adapter]) -> dict[str, Site]:
    """Instruction -> the layer that it is the product of, for all layers that an adapter has.

    Raises InvalidConfig, naming adapter and layer, where that isn't a linear layer of the model, or of other widths.
    """
    products: dict[str, list[Instruction]] = {}  # by weight
    for step in (s for p in served.programs for s in p.instructions):
        weight = step.args[_PRODUCTS[step.target][1]] if step.target in _PRODUCTS and not step.kwargs else None
        if isinstance(weight, Ref) and weight.name.startswith(STATE):
            products.setdefault(weight.name.removeprefix(STATE), []).append(step)
    nodes = {n.name: n for n in captured.program.nodes}
    dimension = token_dimension(captured, served.tokens)
    shared = set(captured.aliases.values())
    sites: dict[str, Site] = {}
    for name, adapter in adapters.items():
        for layer, widths in adapter.widths.items():
            where = f"serve: adapters.{name}: {layer}"
            weight = captured.aliases.get(f"{layer}.weight", f"{layer}.weight")
            steps = products.get(weight, [])
            if not steps:
                known = [w.removesuffix(".weight") for w in products]
                raise InvalidConfig(f"{where}: isn't a linear layer of the model{nearest(layer, known)}")
            if len(steps) > 1 and weight in shared:
                raise InvalidConfig(f"{where}: shares its weight with another layer, and can't have an adapter")
            if not all(rows_are_tokens(nodes[s.name], dimension) for s in steps):
                raise InvalidConfig(f"{where}: isn't computed token by token, and can't have an adapter")
            shape = tuple(captured.state[weight].shape)
            base = shape if steps[0].target == "aten.addmm.default" else shape[::-1]
            if base != widths:
                (i, o), (a, b) = base, widths
                raise InvalidConfig(f"{where}: maps {i} numbers to {o}, but the adapter is made for {a} to {b}")
            sites |= {s.name: Site(layer, s.name in served.selected) for s in steps}
    return sites


def adapt(program: StageProgram, sites: Collection[str]) -> StageProgram:
    """The program with an ADAPTERS instruction behind each of the products `sites`, under the product's name."""
    instructions: list[Instruction] = []
    for step in program.instructions:
        if step.name in sites:
            base = replace(step, name=step.name + _SUFFIX)
            given = step.args[_PRODUCTS[step.target][0]]
            instructions += [base, Instruction(step.name, ADAPTERS, (Ref(base.name), given), {})]
        else:
            instructions.append(step)
    return replace(program, instructions=tuple(instructions))


class StageAdapters:
    """A stage's part of all adapters, and which of it the present step needs.

    layers   layer -> numbers of the adapters that have it, whose ranks lie in this order in its A [W, I] and B [W, O]
    """

    def __init__(
        self, adapters: Sequence[Adapter], sites: Mapping[str, Site], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reads what belongs to the sites, and no more.  Raises CheckpointError."""
        names = {s.layer for s in sites.values()}
        parts = {i: a.load(names, dtype, device) for i, a in enumerate(adapters, 1)}
        self.layers = {n: tuple(i for i in parts if n in parts[i]) for n in names}
        self._sites, self._device = sites, device
        self._a_WI = {n: torch.cat([parts[i][n][0] for i in having]) for n, having in self.layers.items()}
        self._b_WO = {n: torch.cat([parts[i][n][1].t() for i in having]) for n, having in self.layers.items()}
        self._owner_W = {
            having: torch.tensor([i for i in having for _ in range(adapters[i - 1].rank)])
            for having in set(self.layers.values())
        }
        self._needs: dict[tuple[tuple[int, ...], bool], _Need | None] = {}

    def set(self, step: Step) -> None:
        """Prepares what all sites need: before each step."""
        self._needs = {}
        if self._sites and step.adapters_N.any():
            adapter_T = step.adapters_N.repeat_interleave(step.starts_N1.diff())
            for having, owner_W in self._owner_W.items():
                self._needs[having, False] = _need(owner_W, adapter_T, self._device)
                self._needs[having, True] = _need(owner_W, adapter_T[step.rows_R], self._device)

    def bind(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The implementation of an ADAPTERS instruction."""
        site = self._sites[name]
        key = self.layers[site.layer], site.selected
        a_WI, b_WO = self._a_WI[site.layer], self._b_WO[site.layer]

        def add(product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            """product [.., O] of x [.., I], changed in place: nobody else has it."""
            if (need := self._needs.get(key)) is not None:
                ranks, others_TW = need
                within_TW = x.reshape(-1, x.shape[-1]) @ a_WI[ranks].t()
                if others_TW is not None:
                    within_TW.masked_fill_(others_TW, 0.0)
                product.view(-1, product.shape[-1]).addmm_(within_TW, b_WO[ranks])
            return product

        return add


def _need(owner_W: torch.Tensor, adapter_T: torch.Tensor, device: torch.device) -> _Need | None:
    used_W = torch.isin(owner_W, adapter_T).nonzero()[:, 0]
    if not len(used_W):
        return None
    first, end = int(used_W[0]), int(used_W[-1]) + 1
    others_TW = owner_W[used_W] != adapter_T[:, None]
    ranks = slice(first, end) if end - first == len(used_W) else used_W.to(device)
    return ranks, others_TW.to(device) if others_TW.any() else None
