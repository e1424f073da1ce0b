"""A user container for tests that answers on $PORT with bytes that no server would send; the path says which."""

import os
import socket
import threading

OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"Content-Length: 2\r\n\r\nok"
ANSWERS = {
    b"/hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK + BODY,
    b"/large-cookie": OK + b"Set-Cookie: " + b"a" * 20_000 + b"\r\n" + BODY,
    b"/no-http": b"secret\r\n\r\n",
    b"/endless-head": OK + b"X: secret" + b"a" * 1_000_000,
    b"/two-lengths": OK + b"Content-Length: 2\r\n" + BODY,
    b"/no-chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nsecret\r\n",
    b"/coding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"/latin": OK + b"X: caf\xe9\r\n" + BODY,
    b"/hop-by-hop": OK + b"Connection: keep-alive\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=1\r\nTrailer: X-Sum\r\n" + BODY,
    b"/upgrade": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n",
}


def serve(connection: socket.socket) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := connection.recv(65536)):
            return
        received += piece
    told = OK + b"Content-Length: %d\r\n\r\n" % len(received) + received  # itself
    connection.sendall(ANSWERS.get(received.split()[1], told))
    connection.close()


with socket.create_server(("127.0.0.1", int(os.environ["PORT"])), backlog=64) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
