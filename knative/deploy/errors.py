"""What can go wrong on the way to a cluster."""

from weights_cache.environment import masked

MOST_VALUE = 200  # characters of a value that is repeated


class DeployError(Exception):
    """Base of every error that this package raises on purpose; the message is for the person at the terminal."""


class VariableError(DeployError):
    """A variable has a value that cannot be used."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={masked(str(value))[:MOST_VALUE]}: {expected}")


class KubectlError(DeployError):
    """kubectl failed. `reason` tells the failures apart that somebody acts upon: see `kubectl`."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
