"""The few exceptions of the package; each says what was expected, what came, where, and what to do."""

__all__ = ["AdapterError", "BaseError", "MergeError", "ParameterError", "SelectionError", "TaskError", "WorkbenchError"]


class WorkbenchError(ValueError):
    """Parent of every error raised on purpose by workbench."""


class AdapterError(WorkbenchError):
    """An adapter folder cannot be read, is not a plain LoRA, or does not fit its base."""


class BaseError(WorkbenchError):
    """A base model cannot be loaded, or lacks a module that an update names."""


class MergeError(WorkbenchError):
    """A merging method or its options do not suit the stack it was given."""


class ParameterError(WorkbenchError):
    """A notebook's parameter is unknown, or has a value that it cannot take."""


class SelectionError(WorkbenchError):
    """A selection is empty, asks for more adapters than there are, or names an unknown one."""


class TaskError(WorkbenchError):
    """A task does not exist, or has too few examples for what was asked."""
