"""What can go wrong between a queue and a sink, one class for each way that a caller would act on differently."""


class QueueSourceError(Exception):
    """Base of every error this package raises on purpose; its text is for the person who has to act."""


class QueueUnavailable(QueueSourceError):
    """The queue's service could not be reached, or is busy; trying again later may help."""


class ResultRefused(QueueSourceError):
    """The results queue does not take this result, however often it is sent."""


class Unacceptable(QueueSourceError):
    """A message that cannot become an event, however often it is received: poison."""


class ClaimUnavailable(QueueSourceError):
    """What a message refers to could not be fetched; trying again later may help."""


class SinkAway(QueueSourceError):
    """The sink could not be reached, so that it knows nothing of the event."""


class NoAnswer(QueueSourceError):
    """The event was sent and no whole answer came; whether the sink did the work is not known."""
