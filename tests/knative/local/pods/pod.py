"""A user container for tests: answers on $PORT and does what the path says. Files in $NOTES are how a test talks with it."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NOTES = Path(os.environ["NOTES"])
LIMIT_S = 60.0


def wait_for(name: str) -> None:
    """Until the test has put down a file of this name."""
    end = time.monotonic() + LIMIT_S
    while not (NOTES / name).exists() and time.monotonic() < end:
        time.sleep(0.01)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()  # guards the two below, and the file of what was seen
    busy = most_busy = 0  # requests that wait
    healthy = True

    def answer(self) -> None:
        if self.path == "/healthz":
            return self.reply(b"", 200 if Handler.healthy else 500)
        try:
            body = self.body()
        except (ValueError, ConnectionError):
            self.close_connection = True
            return self.see(f"{self.path} cut off")
        self.see(self.path)
        action, *rest = self.path.removeprefix("/").split("/")
        getattr(self, f"act_{action}", self.act_echo)(body, *rest)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def act_echo(self, body: bytes, *_: str) -> None:
        told = {"method": self.command, "path": self.path, "headers": list(self.headers.items()), "pid": os.getpid()}
        self.reply(json.dumps(told | {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}).encode())

    def act_environment(self, _: bytes) -> None:
        self.reply(json.dumps({"env": dict(os.environ), "args": sys.argv[1:], "cwd": os.getcwd()}).encode())  # noqa: PTH109

    def act_wait(self, _: bytes, name: str) -> None:
        with Handler.lock:
            Handler.busy += 1
            Handler.most_busy = max(Handler.most_busy, Handler.busy)
        wait_for(name)
        with Handler.lock:
            Handler.busy -= 1  # before the answer, after which the next request may come
        self.reply(json.dumps({"pid": os.getpid(), "most_busy": Handler.most_busy}).encode())

    def act_pieces(self, _: bytes, name: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"6\r\nfirst\n\r\n")
        wait_for(name)
        self.wfile.write(b"7\r\nsecond\n\r\n0\r\n\r\n")

    def act_events(self, _: bytes, name: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b'data: {"piece": 1}\n\n')
        wait_for(name)
        self.wfile.write(b'event: piece\ndata: {"piece": 2}\n\ndata: [DONE]\n\n')
        self.close_connection = True

    def act_drip(self, _: bytes, count: str, pause_s: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", count)
        self.end_headers()
        for _piece in range(int(count)):
            self.wfile.write(b"x")
            time.sleep(float(pause_s))

    def act_shout(self, _: bytes) -> None:
        """Changes to a protocol of its own: what comes goes back in capital letters, until `bye`."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\nGO ON")
        while (said := self.connection.recv(65536)) and b"bye" not in said:
            self.connection.sendall(said.upper())

    def act_freeze(self, _: bytes) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def act_say(self, body: bytes) -> None:
        print(body.decode(), flush=True)
        self.reply(b"said")

    def act_status(self, _: bytes, code: str) -> None:
        self.send_response(int(code))
        if code not in ("204", "304"):
            self.send_header("Content-Length", "0")
        self.send_header("Location", "/elsewhere")
        self.send_header("Set-Cookie", "colour=blue")
        self.send_header("Set-Cookie", "size=small")
        self.end_headers()

    def act_sicken(self, _: bytes) -> None:
        Handler.healthy = False
        self.reply(b"")

    def act_die(self, _: bytes) -> None:
        os._exit(3)

    def act_deafen(self, _: bytes) -> None:
        self.close_connection = True
        self.reply(b"")
        threading.Thread(target=self.server.shutdown).start()

    def act_half(self, _: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"only this")
        wait_for("half-read")
        os._exit(3)

    def see(self, what: str) -> None:
        with Handler.lock, (NOTES / "seen").open("a") as seen:
            seen.write(f"{what}\n")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.exactly(int(self.headers.get("Content-Length", 0)))
        pieces = b""
        while size := int(self.rfile.readline(), 16):
            pieces += self.exactly(size)
            self.rfile.readline()
        self.rfile.readline()
        return pieces

    def exactly(self, size: int) -> bytes:
        piece = self.rfile.read(size)
        if len(piece) < size:
            raise ConnectionError("it ended early")
        return piece

    def reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if "ce-id" in self.headers:  # an event is answered with an event
            self.send_header("Content-Type", "application/json")
            for name in ("ce-specversion", "ce-id", "ce-source", "ce-type"):
                self.send_header(name, self.headers[name])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


print("a pod of its own", flush=True)
if gate := os.environ.get("GATE"):
    wait_for(gate)
with Server(("127.0.0.1", int(os.environ["PORT"])), Handler) as server:
    server.serve_forever()
signal.pause()  # the port is closed, the process stays
