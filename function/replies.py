"""How an answer that the loop gives goes out: it does not wait for the client, and concludes the request."""

import logging
import time
from typing import Any

from gunicorn import SERVER, http, util

from function import error_shapes
from function.connections import Connection
from function.errors import FunctionError, HttpError
from function.fast_path import Answer
from function.http import written
from function.http_loop import HttpLoop
from function.receiver import HEAD_BYTES
from function.refusals import wire

log = logging.getLogger("relight.function")


class Replies:
    """The loop's."""

    def __init__(self, loop: HttpLoop, config: Any) -> None:
        """config: gunicorn's."""
        self._loop = loop
        self._config = config
        self._date = (0, "")  # the second, and how HTTP says it

    def reply(self, conn: Connection, answer: Answer) -> None:
        """One of the fast path."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = second, util.http_date()
        headers = [("Server", SERVER), ("Date", self._date[1]), *answer.headers]
        self.send(conn, wire(answer.status, headers, answer.body, close=conn.is_last or self._loop.is_ending))

    def send(self, conn: Connection, data: bytes) -> None:
        """From the loop, which does not wait."""
        try:
            conn.sock.sendall(data)
        except OSError as error:
            log.debug("a connection ended: %s", error)
        self._loop.conclude(conn, is_open=not (conn.is_last or self._loop.is_ending))

    def tell(self, conn: Connection, error: Exception) -> None:
        """What is no HTTP request, and what went wrong in gunicorn or the app."""
        if isinstance(error, http.errors.ParseException):
            error = self._said(error)
        elif not isinstance(error, FunctionError):
            log.error("a request failed", exc_info=error)
            error = HttpError(500, "internal_error", "the function failed on this request; its log says why")
        answer = written(error, error_shapes.own)
        conn.is_last = True
        self.send(conn, wire(answer.status, answer.headers, answer.get_data(), close=True))

    def _said(self, error: Exception) -> HttpError:
        """What the client is told of an error of gunicorn's parser."""
        config = self._config
        if isinstance(error, http.errors.LimitRequestLine):
            return HttpError(414, "bad_request", f"the first line of the request is longer than {config.limit_request_line} bytes")
        if isinstance(error, http.errors.LimitRequestHeaders):
            most = f"{HEAD_BYTES} bytes in all, {config.limit_request_field_size} in each, {config.limit_request_fields} headers"
            return HttpError(431, "bad_request", f"the headers of the request are more than is taken here: {most}")
        status = 417 if isinstance(error, http.errors.ExpectationFailed) else 400
        return HttpError(status, "bad_request", f"this is not an HTTP request that is understood here: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What gunicorn says is wrong; of a header only its name, since its value may be a key."""
    if isinstance(error, http.errors.InvalidHeader):
        return f"Invalid HTTP header: {''.join(str(error.hdr).split()[:1])!r:.60}"
    return f"{error!s:.200}"
