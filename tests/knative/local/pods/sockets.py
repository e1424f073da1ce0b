"""A user container for tests that speaks WebSocket on $PORT; files in $NOTES are how a test talks with it."""

import os
from pathlib import Path

from aiohttp import WSMsgType, web

NOTES = Path(os.environ["NOTES"])


def see(what: str) -> None:
    with (NOTES / "seen").open("a") as seen:
        seen.write(f"{what}\n")


async def talk(request: web.Request) -> web.WebSocketResponse:
    """Says hello at once, gives each message back, closes when told to."""
    socket = web.WebSocketResponse(max_msg_size=0, protocols=["talk"])
    await socket.prepare(request)
    see(f"open {request.headers['Host']} {request.headers['X-Forwarded-For']}")
    await socket.send_str(f"hello from {os.getpid()}")
    async for message in socket:
        if message.type is WSMsgType.TEXT and message.data.startswith("close "):
            await socket.close(code=int(message.data.removeprefix("close ")), message=b"as you wish")
        elif message.type is WSMsgType.TEXT and message.data == "die":
            os._exit(3)
        elif message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        else:
            await socket.send_bytes(message.data)
    see(f"closed {socket.close_code}")
    return socket


async def refuse(_: web.Request) -> web.Response:
    return web.Response(status=403, text="not you", headers={"X-Reason": "taste"})


async def plain(_: web.Request) -> web.Response:
    return web.Response(text=f"hello from {os.getpid()}")


application = web.Application()
application.add_routes([web.get("/talk", talk), web.get("/refuse", refuse), web.get("/", plain)])
web.run_app(application, host="127.0.0.1", port=int(os.environ["PORT"]), print=None)
