"""`relight send` and `relight receive`: messages into a queue and out of it."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from knative.local import plain
from knative.local.commands import platform, read_body, told, where
from knative.local.errors import PlatformError
from knative.local.queues import EMBEDDED, LONGEST_POLL_S, Queue, dead_letters, is_queue_url

MOST = 1_000_000


@click.command()
@click.argument("queue")
@click.option("--data", metavar="TEXT|@FILE|-", help="The message: this, a file, or standard input. [default: the example of its Service]")
@click.option("--count", "-n", default=1, show_default=True, type=click.IntRange(1, MOST), help="How many times.")
@click.option("--attribute", "-a", "attributes", multiple=True, metavar="NAME=VALUE", help="A message attribute; may be given again.")
@click.option("--group", default="relight", show_default=True, help="The message group, in a FIFO queue.")
@where
def send(*, queue: str, data: str | None, count: int, attributes: tuple[str, ...], group: str, admin: str | None, state_dir: Path) -> None:
    """Put messages into QUEUE: the name of a queue of the running platform, or the URL of any queue of SQS."""
    with told():
        body = read_body(data)
        given = dict(_attribute(text) for text in attributes)
        status = _status(queue, admin, state_dir)
        try:
            target = _find(queue, status)
            text = _example(queue, status) if body is None else body.decode()
        except UnicodeDecodeError as error:
            raise PlatformError(f"--data: byte {error.start} is not UTF-8; a message is text") from error
        target.send([text] * count, given, group)
        click.echo(f"{count} message{'s' * (count != 1)} sent to {queue}")


@click.command()
@click.argument("queue")
@click.option("--count", "-n", type=click.IntRange(1, MOST), help="How many at most. [default: all]")
@click.option(
    "--wait", "wait_s", default=1, show_default=True, type=click.IntRange(0, LONGEST_POLL_S), help="Seconds without a message to end after."
)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each, with its id and attributes.")
@where
def receive(*, queue: str, count: int | None, wait_s: int, as_json: bool, admin: str | None, state_dir: Path) -> None:
    """Take messages out of QUEUE and print them, a line each; what is printed is deleted."""
    with told():
        for message in _find(queue, _status(queue, admin, state_dir), wait_s).receive(count or MOST):
            text = plain.body(message.body) if sys.stdout.isatty() else message.body
            click.echo(json.dumps({"id": message.id, "attributes": message.attributes, "body": message.body}) if as_json else text)
            sys.stdout.flush()  # before it is deleted


def _status(queue: str, admin: str | None, state_dir: Path) -> Any:
    """The platform's document, if that is to tell where the queue is."""
    return None if is_queue_url(queue) else platform(admin, state_dir).get("/api/status")


def _find(queue: str, status: Any, wait_s: int = 0) -> Queue:
    url = queue
    if status is not None:
        urls = {found["name"]: found["url"] for found in status["queues"]}
        dead = {dead_letters(name): url.removesuffix(name) + dead_letters(name) for name, url in urls.items()}
        if queue not in urls and queue not in dead:
            raise PlatformError(f"no queue {queue!r}; there are {', '.join(urls) or 'none'}; one that is elsewhere is named by its URL")
        url = (dead | urls)[queue]
    is_local = urlsplit(url).hostname in ("127.0.0.1", "localhost")
    return Queue(url, {**EMBEDDED, **os.environ} if is_local else os.environ, wait_s)


def _example(queue: str, status: Any) -> str:
    """The request body that the author of the Service behind the queue gave as an example."""
    sinks = [source["sink"].partition("/")[0] for source in status["queue_sources"] if source["queue"] == queue] if status else []
    examples = [service["example"] for service in status["services"] if service["name"] in sinks] if sinks else []
    if not examples:
        raise PlatformError("--data: must be given, as no Service here gets the messages of this queue")
    return str(examples[0])


def _attribute(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise PlatformError(f"--attribute {text!r}: must be NAME=VALUE")
    return name, value
