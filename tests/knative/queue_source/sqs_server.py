"""moto's SQS as a process that tests and benchmarks can rely on: `python -m tests.knative.queue_source.sqs_server PORT`.

moto itself loses messages when a send and a delete meet, and hands one message to two receives that meet: here one request runs at a time
(a long poll asks again and again). `POST /_control` takes a JSON document of what is to change:

    throttle, error, lost   the share of calls that are refused as too many, that fail, or that are done and then answered with an error;
                            sends are spared
    fill                    {"queue": NAME, "count": N, "depth": D}: put messages into a queue, no more than D at a time
    watch                   NAME of the queue whose messages in flight are counted after each receive, and whose new visibilities are kept

`GET /_stats` is a JSON document: calls by name, most in flight, the visibilities that were asked for in seconds, receives of each message
that was received more than once, and the seconds from the first receive to the last delete.
"""

import importlib
import io
import json
import logging
import random
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.sqs.models import Message, sqs_backends
from werkzeug.serving import WSGIRequestHandler, make_server

ACCOUNT, REGION = "123456789012", "us-east-1"
LOOK_S = 0.05  # between two looks of a long poll

# For each message that is received moto counts all that there are, several times, to learn how long a queue keeps them; and it looks at
# its clock, which is slow, for each of these.
_models: Any = importlib.import_module("moto.sqs.models")
_models.SQSBackend.is_message_valid_based_on_retention_period = lambda *_: True
_models.unix_time_millis = lambda: time.time() * 1000


Start = Callable[..., Any]


class SqsServer:
    """The WSGI application."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()  # guards what follows, and moto
        self._faults = {"throttle": 0.0, "error": 0.0, "lost": 0.0}
        self._random = random.Random(7)
        self._fill: dict[str, Any] = {}
        self._filled = 0
        self._watched = ""
        self._changes: list[int] = []
        self._calls: Counter[str] = Counter()
        self._receives: Counter[str] = Counter()
        self._most = 0
        self._first = self._last = 0.0

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        """One request."""
        path = environ["PATH_INFO"]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if path == "/_control":
            with self._lock:
                self._control(json.loads(body))
            return _json(start, {})
        if path == "/_stats":
            with self._lock:
                return _json(start, self._stats())
        name = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        if not name:
            return self._ask(environ, body, start)
        with self._lock:
            self._calls[name] += 1
            chance = self._random.random()
        for fault, share in self._faults.items() if not name.startswith(("Send", "Create")) else ():
            if chance < share:
                if fault == "lost":
                    self._perform(environ, name, body)
                code = "RequestThrottled" if fault == "throttle" else "InternalFailure"
                return _json(
                    start, {"__type": code, "message": fault}, "400 Bad Request" if fault == "throttle" else "500 Internal Server Error"
                )
            chance -= share
        status, headers, reply = self._perform(environ, name, body)
        start(status, headers)
        return [reply]

    def _perform(self, environ: Mapping[str, Any], name: str, body: bytes) -> tuple[str, Any, bytes]:
        if name != "ReceiveMessage":
            with self._lock:
                answer = self._inner(environ, body)
                if name == "ChangeMessageVisibilityBatch" and self._watched:
                    asked = json.loads(body)
                    if asked["QueueUrl"].endswith(f"/{self._watched}"):
                        self._changes += [entry["VisibilityTimeout"] for entry in asked["Entries"]]
                if name.startswith("DeleteMessage"):
                    self._last = time.monotonic()
                    self._refill()
                return answer
        asked = json.loads(body)
        end = time.monotonic() + asked.get("WaitTimeSeconds", 0)
        body = json.dumps({**asked, "WaitTimeSeconds": 0}).encode()
        while True:
            with self._lock:
                answer = self._inner(environ, body)
                found = json.loads(answer[2]).get("Messages", ()) if answer[0].startswith("200") else ()
                if found:
                    self._first = self._first or time.monotonic()
                    for message in found:
                        self._receives[message["MessageId"]] += 1
                    if self._watched:
                        messages = sqs_backends[ACCOUNT][REGION].queues[self._watched]._messages
                        self._most = max(self._most, sum(not message.visible for message in messages))
            if found or time.monotonic() >= end or not answer[0].startswith("200"):
                return answer
            time.sleep(LOOK_S)

    def _inner(self, environ: Mapping[str, Any], body: bytes) -> tuple[str, Any, bytes]:
        said: list[Any] = []

        def start(status: str, headers: Any, *_: Any) -> None:
            said.extend((status, headers))

        reply = b"".join(self._ask({**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}, body, start))
        return said[0], said[1], reply

    def _ask(self, environ: dict[str, Any], body: bytes, start: Start) -> Iterable[bytes]:
        environ["wsgi.input"] = io.BytesIO(body)
        found: Iterable[bytes] = self._moto(environ, start)
        return found

    def _control(self, asked: dict[str, Any]) -> None:
        if "watch" in asked:
            self._watched, self._changes = asked.pop("watch"), []
        if fill := asked.pop("fill", None):
            self._fill, self._filled, self._most = fill, 0, 0
            self._first = self._last = 0.0
            self._calls.clear()
            self._receives.clear()
            self._refill()
        self._faults |= asked

    def _refill(self) -> None:
        if self._fill:
            queue = sqs_backends[ACCOUNT][REGION].queues[self._fill["queue"]]
            while self._filled < self._fill["count"] and len(queue._messages) < self._fill["depth"]:
                message = Message(str(uuid.uuid4()), json.dumps({"n": self._filled, "text": "A man is eating food." * 4}))
                message.mark_sent()
                queue.add_message(message)
                self._filled += 1

    def _stats(self) -> dict[str, Any]:
        return {
            "calls": self._calls,
            "most_in_flight": self._most,
            "changes": self._changes,
            "received": len(self._receives),
            "repeated": {key: count for key, count in self._receives.items() if count > 1},
            "seconds": self._last - self._first,
            "left": len(sqs_backends[ACCOUNT][REGION].queues[self._fill["queue"]]._messages) if self._fill else None,
            "unfilled": self._fill["count"] - self._filled if self._fill else 0,
        }


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as SQS keeps them

    def log(self, *_: Any) -> None:
        pass


def _json(start: Start, document: Any, status: str = "200 OK") -> list[bytes]:
    body = json.dumps(document).encode()
    start(status, [("Content-Type", "application/x-amz-json-1.0"), ("Content-Length", str(len(body)))])
    return [body]


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    make_server("127.0.0.1", int(sys.argv[1]), SqsServer(), threaded=True, request_handler=_Handler).serve_forever()
