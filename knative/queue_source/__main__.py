"""`python -m knative.queue_source`, configured by the QUEUE_SOURCE_ variables and K_SINK."""

from knative.queue_source.cli import command

command()
