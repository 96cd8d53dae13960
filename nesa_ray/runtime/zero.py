"""The optimizer of one stage's replica, its gradients reduced and its state sharded over the stage's replicas.

ZeRO (Rajbhandari et al., arXiv 1910.02054) through DeepSpeed: 1 shards the optimizer state, 2 the gradients as well, 3
the parameters too.  Each stage's replicas are a torch.distributed world of their own.

Micro-batches accumulate into plain leaf tensors that share the parameters' storage (`weights`), outside of DeepSpeed;
once a step the sums are handed to it as gradients of scalars (`_Deliver`), by its ordinary forward, backward and step.
So gradients are reduced once per step, and no hook sees a micro-batch.  A sum is handed over when it is whole
(gradients.py): from a thread of its own, `reduce` works beside the last backwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nesa_ray.errors import InvalidConfig
from nesa_ray.runtime.averaging import Mean
from nesa_ray.runtime.gradients import StepGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101).  `weight_decay` acts on tensors of two or more dimensions."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalConfig:
    """Local steps (runtime/local_steps.py).

    steps      between two agreements on a parameter
    fragments  of the parameters, which are agreed on in turn
    delay      steps that run while a fragment is being agreed on
    lr, momentum  of the outer optimizer
    codec      raw or int8
    """

    steps: int = 32
    fragments: int = 4
    delay: int = 1
    lr: float = 0.7
    momentum: float = 0.9
    codec: str = "int8"

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        for name, least in (("steps", 1), ("fragments", 1), ("delay", 0)):
            if getattr(self, name) < least:
                raise InvalidConfig(f"train: local.{name}: needs an integer ≥ {least}, got {getattr(self, name)}")
        if self.delay >= self.steps:
            raise InvalidConfig(f"train: local.delay: needs less than local.steps, {self.steps}, got {self.delay}")
        if not self.lr > 0:
            raise InvalidConfig(f"train: local.lr: needs a number > 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise InvalidConfig(f"train: local.momentum: needs a number from 0 to below 1, got {self.momentum}")
        if self.codec not in ("raw", "int8"):
            raise InvalidConfig(f"train: local.codec: needs raw or int8, got {self.codec!r}")


BUCKET_BYTES = 1 << 24  # of gradients that are reduced together
# "exp_avg" and "exp_avg_sq" -> parameter name -> tensor of its shape
Moments = Mapping[str, Mapping[str, torch.Tensor]]
MOMENTS = ("exp_avg", "exp_avg_sq")


class StageOptimizer(Protocol):
    """What a training stage needs of its optimizer."""

    def weights(self) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
        """The stage's parameters as leaves for one step, by name; valid, and whole, inside the context only."""

    def reduce(self, gradients: StepGradients, *, norm: bool = False) -> float:
        """Averages the leaves' gradients over the replicas, as they become whole.  Inside `weights()`.

        Returns the square of the averaged gradient's 2-norm over the stage, if asked for, else 0.
        """

    def update(self, lr: float, scale: float = 1.0) -> None:
        """Steps the optimizer with the averaged gradients times `scale`.  After `reduce`, inside `weights()`."""

    def skip(self) -> None:
        """Takes no step, in place of `reduce` and `update`."""

    def settle(self, *, moments: bool = False) -> None:
        """Makes parameters (and moments) the same on every replica, which all have to call it."""

    @property
    def moment_names(self) -> tuple[str, ...]:
        """What `moments` has and `load` takes; those beyond MOMENTS may be missing for `load`."""

    def moments(self) -> Moments:
        """Adam's two moments (and others) of each parameter, whole, by name; every replica has to call it.

        Empty before a step.
        """

    def load(self, moments: Moments, steps: int) -> None:
        """Takes over the moments after that many steps; before the first step."""


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, *, zero_stage: int, replicas: int,
    reduce_codec: str = "raw", local: LocalConfig | None = None,
) -> StageOptimizer:  # fmt: skip
    """The optimizer for a ZeRO stage; with one replica, or stage 0, nothing is sharded and DeepSpeed isn't loaded.

    reduce_codec  raw, or int8 (averaging.py), at stage 0
    local         replicas train by themselves and agree now and then (local_steps.py), at stage 0

    With several replicas torch.distributed must be initialised.  Raises InvalidConfig for a stage other than 0-3.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise InvalidConfig(f"zero_stage: needs 0, 1, 2 or 3, got {zero_stage!r}")
    if not parameters:
        return _NothingToTrain()
    if replicas > 1 and local is not None:
        from nesa_ray.runtime.local_steps import LocalStepsOptimizer

        return LocalStepsOptimizer(parameters, config, local)
    if zero_stage == 0 or replicas == 1:
        return ReplicatedOptimizer(parameters, config, replicas, reduce_codec)
    return ZeroOptimizer(parameters, config, zero_stage)


def _adamw(parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    decay = [p for p in parameters.values() if p.dim() >= 2]
    rest = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": g, "weight_decay": d} for g, d in ((decay, config.weight_decay), (rest, 0.0)) if g]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _leaves(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {n: p.detach().requires_grad_() for n, p in parameters.items()}


def _buckets(parameters: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[list[str]]:
    """Runs of names whose parameters have at most BUCKET_BYTES, or of a single one."""
    buckets: list[list[str]] = []
    held = 0
    for name in names:
        n_bytes = parameters[name].numel() * parameters[name].element_size()
        if not buckets or held + n_bytes > BUCKET_BYTES:
            buckets.append([])
            held = 0
        buckets[-1].append(name)
        held += n_bytes
    return buckets


class _Whole:
    """What optimizers have in common whose replicas are the same after every step."""

    moment_names = MOMENTS

    def skip(self) -> None:
        """See StageOptimizer."""

    def settle(self, *, moments: bool = False) -> None:
        """See StageOptimizer."""


class _NothingToTrain(_Whole):
    """A stage without trainable parameters."""

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict[str, torch.Tensor]]:
        yield {}

    def reduce(self, gradients: StepGradients, *, norm: bool = False) -> float:
        return 0.0

    def update(self, lr: float, scale: float = 1.0) -> None:
        pass

    def moments(self) -> Moments:
        return {m: {} for m in MOMENTS}

    def load(self, moments: Moments, steps: int) -> None:
        pass


class ReplicatedOptimizer(_Whole):
    """Parameters, gradients and optimizer state whole on every replica; all gradients are averaged in every step."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, replicas: int, codec: str = "raw"
    ) -> None:
        self._parameters, self._replicas = dict(parameters), replicas
        self._mean = Mean(codec) if replicas > 1 else None
        self._adamw = _adamw(parameters, config)

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """See StageOptimizer."""
        yield _leaves(self._parameters)

    def reduce(self, gradients: StepGradients, *, norm: bool = False) -> float:
        """See StageOptimizer."""
        for names in _buckets(self._parameters, gradients.names):
            bucket = [gradients.take(n) for n in names]
            if self._mean is not None:
                flat = self._mean(names[0], torch._utils._flatten_dense_tensors(bucket))
                for g, part in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket), strict=True):
                    g.copy_(part)
            for n, g in zip(names, bucket, strict=True):
                self._parameters[n].grad = g
        if not norm:
            return 0.0
        return float(sum(p.grad.double().square().sum() for p in self._parameters.values() if p.grad is not None))

    def update(self, lr: float, scale: float = 1.0) -> None:
        """See StageOptimizer."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self._parameters.values() if p.grad is not None], scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def moments(self) -> Moments:
        """See StageOptimizer."""
        state = self._adamw.state
        return {m: {n: state[p][m] for n, p in self._parameters.items() if m in state[p]} for m in MOMENTS}

    def load(self, moments: Moments, steps: int) -> None:
        """See StageOptimizer."""
        for n, p in self._parameters.items():
            values = {m: moments[m][n].to(p.device, copy=True) for m in MOMENTS}
            self._adamw.state[p] = {"step": torch.tensor(float(steps), device=p.device), **values}


class _Deliver(torch.autograd.Function):
    """A scalar whose gradient with respect to a parameter is what `gradients` has for it, once that is whole."""

    @staticmethod
    def forward(ctx: Any, gradients: StepGradients, name: str, parameter: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.name = gradients, name
        return torch.zeros((), device=parameter.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, gradients.take(ctx.name)


class _Parameters(torch.nn.Module):
    """The stage's parameters as DeepSpeed sees them: its backward delivers the gradients of a step in their order."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._attributes = {n: f"p{i}" for i, n in enumerate(parameters)}
        for n, p in parameters.items():
            self.register_parameter(self._attributes[n], p)

    def forward(self, gradients: StepGradients) -> torch.Tensor:
        mine = {n: getattr(self, a) for n, a in self._attributes.items()}
        # Autograd begins with what was made last.
        parts = [_Deliver.apply(gradients, n, mine[n]) for n in reversed(gradients.names)]
        return torch.stack(parts).sum()


class ZeroOptimizer(_Whole):
    """DeepSpeed ZeRO 1-3 over the default torch.distributed world (gloo on CPU, nccl on GPUs)."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, zero_stage: int) -> None:
        deepspeed = _load_deepspeed()
        self._deepspeed, self._parameters, self._zero_stage = deepspeed, dict(parameters), zero_stage
        elements = sum(p.numel() for p in parameters.values())
        bucket = max(1 << 16, min(elements // 16, BUCKET_BYTES // 4))
        holder = _Parameters(parameters)
        self._engine, *_ = deepspeed.initialize(
            model=holder,
            optimizer=_adamw(parameters, config),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,  # its default of 1.0 would clip by this stage's norm alone
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": zero_stage,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    "overlap_comm": False,
                    "contiguous_gradients": True,
                    "stage3_param_persistence_threshold": 0,
                    "stage3_prefetch_bucket_size": bucket,
                    "stage3_max_live_parameters": elements,
                },
            },
        )

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """See StageOptimizer.  Under ZeRO-3 the parameters are gathered here, and partitioned again at the end."""
        if self._zero_stage == 3:
            with self._deepspeed.zero.GatheredParameters(list(self._parameters.values())):
                leaves = _leaves(self._parameters)
                yield leaves
                leaves.clear()
        else:
            yield _leaves(self._parameters)

    def reduce(self, gradients: StepGradients, *, norm: bool = False) -> float:
        """See StageOptimizer."""
        self._engine.backward(self._engine(gradients))
        if not norm:
            return 0.0
        optimizer = self._engine.optimizer
        if self._zero_stage < 3:
            return float(optimizer.scaled_global_norm()) ** 2
        return sum(float(g) ** 2 for g in optimizer._get_norm_groups())

    def update(self, lr: float, scale: float = 1.0) -> None:
        """See StageOptimizer."""
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.loss_scale = 1.0 / scale  # it divides the gradients by it
        self._engine.step()
        optimizer.loss_scale = 1.0

    def moments(self) -> Moments:
        """See StageOptimizer."""
        self._link_states()
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        return {m: {n: get(p, m) for n, p in self._parameters.items()} for m in MOMENTS}

    def load(self, moments: Moments, steps: int) -> None:
        """See StageOptimizer."""
        with self.weights() as leaves:  # a step of nothing makes the state that is then overwritten
            for leaf in leaves.values():
                leaf.grad = torch.zeros_like(leaf)
            self.reduce(StepGradients.whole(leaves))
            self.update(0.0)
        self._link_states()
        for m in MOMENTS:
            for n, p in self._parameters.items():
                self._set_moment(p, m, moments[m][n].to(p.device))
        for state in self._engine.optimizer.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(steps))

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        utils = self._deepspeed.utils
        if self._zero_stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # The share of this replica: DeepSpeed's own cutting fails where the last share is padded.
        share = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, share * dist.get_world_size() - value.numel()))
        utils.safe_set_local_optimizer_state(parameter, padded.narrow(0, share * dist.get_rank(), share), moment)

    def _link_states(self) -> None:
        """ZeRO 1 and 2 link parameters to their state within the first group's step, when other groups have none."""
        if self._zero_stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _load_deepspeed() -> Any:
    """DeepSpeed, quiet, and without building its shared-memory operator (60-80 s at first use, needs a compiler)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # an actor sees one device
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed
