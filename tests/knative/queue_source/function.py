"""A function to be killed: `python -m tests.knative.queue_source.function PORT LOG SEED`.

It works for some milliseconds, writes what it has done into the log and answers, in one thread: a kill between the two is work that
nobody can know of. Now and then it is busy or fails first. Poison, which is a string, is a 400.
"""

import asyncio
import json
import os
import random
import sys
import time
from typing import Any


class Function(asyncio.Protocol):
    """One connection."""

    def __init__(self, chance: random.Random, log: int) -> None:
        self._chance, self._log = chance, log
        self._got = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if not end or len(body) < int(headers[b"content-length"]):
            return
        self._got = b""
        number, drawn = json.loads(body)["n"], self._chance.random()
        if isinstance(number, str):
            self._answer(400)
        elif drawn < 0.015:
            self._answer(self._chance.choice((429, 503)), f"Retry-After: {self._chance.choice((0, 1))}\r\n")
        elif drawn < 0.025:
            self._answer(500)
        else:
            line = f"{number} {headers[b'ce-id'].decode()} {time.monotonic():.4f}\n".encode()
            asyncio.get_running_loop().call_later(self._chance.uniform(0.005, 0.03), self._done, line)

    def _done(self, line: bytes) -> None:
        os.write(self._log, line)
        self._answer(200)

    def _answer(self, status: int, more: str = "") -> None:
        self._transport.write(f"HTTP/1.1 {status} Said\r\n{more}Content-Length: 0\r\n\r\n".encode())


async def main(port: int, path: str, seed: int) -> None:
    """Until it is killed."""
    chance, log = random.Random(seed), os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    server = await asyncio.get_running_loop().create_server(lambda: Function(chance, log), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
