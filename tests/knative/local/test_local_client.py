"""The commands' side of the admin port, where somebody answers as no platform does."""

import socket
import threading
from collections.abc import Callable

import pytest

from knative.local import client
from knative.local.client import Client, NoPlatform
from knative.local.errors import PlatformError

BEGUN = b"HTTP/1.1 200 OK\r\nX-Relight: admin\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 ", BEGUN + b"{", BEGUN + b"data: 1\n"])
@pytest.mark.parametrize("ask", [lambda admin: Client(admin).get("/api/status"), lambda admin: list(Client(admin).events())])
def test_who_does_not_answer_in_time_is_no_platform(monkeypatch: pytest.MonkeyPatch, said: bytes, ask: Callable[[str], object]) -> None:
    monkeypatch.setattr(client, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def answer() -> None:
            held.append(server.accept()[0])
            held[0].sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(PlatformError) as told:
            ask(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert isinstance(told.value, NoPlatform) or "has ended" in str(told.value)
        answering.join()
        held[0].close()
