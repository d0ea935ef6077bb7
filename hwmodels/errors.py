"""The errors a person can cause, and nothing else.

ScheInferError            base of all; a ValueError, so callers may catch either
├── FormatError           a file or value is not what it should be: where, what was found, what is allowed
├── ProfileError          a hardware profile cannot answer what was asked
├── ModelError            a model description is unusable or not supported
├── GraphError            a task graph is not a graph of tasks in a runnable order
├── PlanError             no plan fits, or a plan does not fit this model or machine
├── CheckpointError       a checkpoint folder or one of its files is unusable
├── KernelError           the native CPU kernel was asked for and cannot be used
└── ExecutionError        a task failed while running; names the task
"""


class ScheInferError(ValueError):
    """Base of every error that the user can act on."""


class FormatError(ScheInferError):
    """A file or a value has the wrong form."""


class ProfileError(ScheInferError):
    """A hardware profile lacks what was asked of it."""


class ModelError(ScheInferError):
    """A model description is unusable or unsupported."""


class GraphError(ScheInferError):
    """A task graph cannot be executed."""


class PlanError(ScheInferError):
    """No plan fits, or this plan fits neither this model nor this machine."""


class CheckpointError(ScheInferError):
    """A checkpoint folder or file is unusable."""


class ExecutionError(RuntimeError, ScheInferError):
    """A task failed while it ran; the message names the task."""


class KernelError(ScheInferError):
    """The native CPU kernel was asked for and cannot be used."""
