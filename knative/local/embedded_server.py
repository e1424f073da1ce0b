"""The embedded cloud: object storage (S3) and queues (SQS) in memory, for one machine. `python -m knative.local.embedded_server PORT`."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.sqs import models
from moto.sqs.models import Queue, sqs_backends
from werkzeug.serving import make_server

from knative.local.queues import ACCOUNT, OLDEST, REGION

# Guards all queues: moto's are not made for threads. A message that is sent while another one is deleted would be lost, and one that two
# ask for would be given to both.
_turn = threading.Lock()
_wait_for_messages = Queue.wait_for_messages


def _wait(queue: Queue, timeout: int) -> None:
    """Of a long poll, which must not keep the others from sending what it waits for."""
    _turn.release()
    try:
        _wait_for_messages(queue, timeout)
    finally:
        _turn.acquire()


class Server:
    """moto, with one request for queues at a time."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """WSGI."""
        if environ["PATH_INFO"] == OLDEST:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(_oldest()).encode()]
        if not environ.get("HTTP_X_AMZ_TARGET", "").startswith("AmazonSQS."):
            return self._moto(environ, start_response)  # type: ignore[no-any-return]
        with _turn:
            return self._moto(environ, start_response)  # type: ignore[no-any-return]


def _now_ms() -> float:
    return time.time() * 1000


def _oldest() -> dict[str, float]:
    """Seconds since the epoch, by queue; without those that are empty."""
    with _turn:
        sent = {name: [message.sent_timestamp for message in queue._messages] for name, queue in _queues()}  # noqa: SLF001
    return {name: min(times) / 1000 for name, times in sent.items() if times}


def _queues() -> list[tuple[str, Any]]:
    return list(sqs_backends[ACCOUNT][REGION].queues.items())


def main() -> None:
    """Serve on a loopback port until SIGTERM."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    os.environ["MOTO_ACCOUNT_ID"] = ACCOUNT  # read by moto at each request
    Queue.wait_for_messages = _wait  # type: ignore[method-assign,assignment]
    # Of each message that is received moto asks how long the queue keeps it, for which it counts all that there are, by a slow clock.
    models.SQSBackend.is_message_valid_based_on_retention_period = lambda *_: True  # type: ignore[method-assign]
    models.unix_time_millis = _now_ms  # type: ignore[attr-defined,assignment]
    server = make_server("127.0.0.1", int(sys.argv[1]), Server(), threaded=True, request_handler=MotoRequestHandler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the platform, which then ends us
    server.serve_forever(poll_interval=0.1)
    os._exit(0)  # without those who wait for messages


if __name__ == "__main__":
    main()
