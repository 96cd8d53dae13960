"""Every error that nesa_ray raises on purpose.

NesaError
├── InvalidInput          what the user gave can't be used: one line, says what, where, what was needed  (exit 2)
│   ├── InvalidConfig     a configuration key or value
│   ├── InvalidGraph      a graph.json, or a Graph built by hand
│   ├── InvalidTopology   a cluster.json, or a Topology built by hand
│   ├── InvalidPlan       a plan.json that doesn't fit its graph or topology
│   ├── ContextExceeded   a prompt longer than the served model's context
│   ├── UnknownModel      a model that isn't served here
│   ├── CaptureError      a module that can't be captured; names the line of the model's code
│   └── CheckpointError   a checkpoint that doesn't fit the model, or isn't whole
├── Infeasible            no plan exists: says which limit bars it                                        (exit 2)
└── RuntimeFailure        something broke while a plan was running                                        (exit 1)
    ├── StageFailed       a stage raised; names the stage and the node
    ├── PeerLost          the other end of a Channel went away
    ├── Overloaded        more requests than the engine takes; later ones may be taken
    └── Timeout           something that should have happened in time didn't
"""


class NesaError(Exception):
    """The root of all errors that nesa_ray raises on purpose."""

    exit_code = 1


class InvalidInput(NesaError, ValueError):
    """What the user gave can't be used."""

    exit_code = 2


class InvalidConfig(InvalidInput):
    """A configuration key or value can't be used."""


class InvalidGraph(InvalidInput):
    """A graph is malformed."""


class InvalidTopology(InvalidInput):
    """A cluster description is malformed, or the live cluster lacks what was asked of it."""


class InvalidPlan(InvalidInput):
    """A plan doesn't fit its graph or its topology."""


class ContextExceeded(InvalidInput):
    """A prompt that the served model's context can't hold."""


class UnknownModel(InvalidInput):
    """A model that isn't served here."""


class CaptureError(InvalidInput):
    """A module can't be captured as one graph."""


class CheckpointError(InvalidInput):
    """A checkpoint doesn't fit the model, or isn't whole."""


class Infeasible(NesaError):
    """No plan satisfies the limits; the message says which one bars it."""

    exit_code = 2


class RuntimeFailure(NesaError):
    """Something broke while a plan was running."""


class StageFailed(RuntimeFailure):
    """A stage raised while it ran."""


class PeerLost(RuntimeFailure):
    """The other end of a Channel went away."""


class Overloaded(RuntimeFailure):
    """More requests than the engine takes."""


class Timeout(RuntimeFailure):
    """Something that should have happened in time didn't."""
