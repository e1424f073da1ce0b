"""What can go wrong with weights, one class for each way that a caller would act on differently."""

from weights_cache.excerpt import told


class WeightsError(Exception):
    """Base of every error this package raises on purpose; its text is meant for the person who has to act.

    It is one line of a bounded length without secrets, whatever it was made of: it is shown in logs, statuses and dashboards.
    """

    def __init__(self, text: object) -> None:
        super().__init__(told(str(text)))


class CacheError(WeightsError):
    """The cache directory cannot be used as it is."""


class StoreError(WeightsError):
    """The object store said no, for a reason that trying again does not change."""


class StoreUnavailable(StoreError):
    """The object store could not be reached, or is busy; trying again later may help."""


class ObjectChanged(StoreError):
    """An object is no longer the version that was listed."""


class HeaderError(WeightsError):
    """A safetensors header does not describe the file it is in."""
