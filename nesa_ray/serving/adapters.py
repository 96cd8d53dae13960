"""LoRA adapters over one base, several in one batch: the rows of a product get what their own adapters add.

The base's product is computed as it ever is, for all rows at once; then each adapter that the step has adds
scale · B A x to the rows that use it, gathered (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).  What makes the
product doesn't matter, so it may be packed, or a slice of several computed as one.

Adapters are numbered from 1; rows of number 0 are the base's alone.
Shapes: T tokens of the step, R rows whose results are wanted, N sequences, I and O widths of a layer, r rank.
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
Groups = list[tuple[int, torch.Tensor | None]]  # number of an adapter, and its rows; None: all


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
    """A stage's part of all adapters, and whose rows of the present step are whose."""

    def __init__(
        self, adapters: Sequence[Adapter], sites: Mapping[str, Site], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reads what belongs to the sites, and no more.  Raises CheckpointError."""
        layers = {s.layer for s in sites.values()}
        self._sites, self._device = sites, device
        self._of_number = {i: a.load(layers, dtype, device) for i, a in enumerate(adapters, 1)}
        self.tokens: Groups = []
        self.selected: Groups = []

    def set(self, step: Step, rows_R: torch.Tensor) -> None:
        """Prepares what all sites need: before each step."""
        self.tokens, self.selected = [], []
        if self._sites and step.adapters_N.any():
            adapter_T = step.adapters_N.repeat_interleave(step.starts_N1.diff())
            self.tokens, self.selected = self._grouped(adapter_T), self._grouped(adapter_T[rows_R])

    def _grouped(self, adapter_T: torch.Tensor) -> Groups:
        numbers = adapter_T.unique().tolist()
        alone = len(numbers) == 1
        return [(i, None if alone else (adapter_T == i).nonzero()[:, 0].to(self._device)) for i in numbers if i]

    def bind(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The implementation of an ADAPTERS instruction."""
        site = self._sites[name]
        parts = {i: layers[site.layer] for i, layers in self._of_number.items() if site.layer in layers}

        def add(product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            """product [.., O] of x [.., I], changed in place: nobody else has it."""
            for number, rows in self.selected if site.selected else self.tokens:
                if number in parts:
                    a_rI, b_Or = parts[number]
                    y, x_I = product.view(-1, product.shape[-1]), x.reshape(-1, x.shape[-1])
                    if rows is None:
                        y.addmm_(x_I @ a_rI.t(), b_Or.t())
                    else:
                        y.index_add_(0, rows, x_I.index_select(0, rows) @ a_rI.t() @ b_Or.t())
            return product

        return add
