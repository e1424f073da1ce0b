"""What can go wrong in this package, and who is told: always the user of `relight simulate`, in one line."""

from __future__ import annotations


class SimulatorError(Exception):
    """Base of every error this package raises on purpose."""


class TraceError(SimulatorError):
    """A trace that cannot be read, or not be simulated."""


class ModelError(SimulatorError):
    """A setting of the model that is unknown or out of bounds."""


class PolicyError(SimulatorError):
    """A policy or a knob of one that is unknown or out of bounds."""
