"""A user container that writes down, in a file for each process, every request that it gets and when it is told to stop."""

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JOURNAL = os.open(Path(os.environ["NOTES"]) / f"journal-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
SECONDS = float(os.environ.get("SECONDS", "0.02"))


def write(line: str) -> None:
    os.write(JOURNAL, f"{line}\n".encode())  # in one piece, so that nothing is half there when we are killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        if size := int(self.headers.get("Content-Length", 0)):
            self.rfile.read(size)
        write(f"got {self.path}")
        time.sleep(SECONDS)
        body = self.path.encode()
        # One write: whoever is answered at all is answered in full.
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def stop(*_: object) -> None:
    write("told to stop")
    threading.Thread(target=server.shutdown).start()


with Server(("127.0.0.1", int(os.environ["PORT"])), Handler) as server:
    signal.signal(signal.SIGTERM, stop)
    server.serve_forever()
