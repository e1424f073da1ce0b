"""Asking a container how it is: one HTTP request, one TCP connection or one command."""

import asyncio
import contextlib
import errno
import os
import signal
from typing import NamedTuple

import aiohttp

from knative.local.descriptors import NoDescriptors, as_before
from knative.local.launch import Probe, Process

DOCUMENT_BYTES = 64 << 10


class Answer(NamedTuple):
    """What came back. `is_well`: None if it could not be asked. `document`: a body in JSON, if there was one."""

    is_well: bool | None
    why: str = ""  # it is not
    document: bytes | None = None


class Tally:
    """Turns answers into a verdict, by the probe's thresholds."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._successes = self._failures = 0

    def add(self, is_well: bool | None) -> bool | None:
        """Whether it is well or not, from now on; None is no verdict yet, so that what it was before holds."""
        if is_well is None:
            return None
        self._successes = self._successes + 1 if is_well else 0
        self._failures = 0 if is_well else self._failures + 1
        if self._successes >= self._probe.successes:
            return True
        return False if self._failures >= self._probe.failures else None

    def clear(self) -> None:
        """Begin again."""
        self._successes = self._failures = 0


async def ask(probe: Probe, process: Process, session: aiohttp.ClientSession) -> Answer:
    """One probe of a container's process."""
    try:
        async with asyncio.timeout(probe.timeout_s):
            if probe.command:
                return await _run(probe, process)
            if probe.path is None:
                _, writer = await asyncio.open_connection("127.0.0.1", probe.port)
                writer.close()
                return Answer(True)
            return await _get(probe, session)
    except TimeoutError:
        return Answer(False, f"{_show(probe)} gave no answer within {probe.timeout_s:g} s")
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, OSError) and NoDescriptors.explains(error):
            return Answer(None, f"{_show(probe)} could not be asked for want of a file descriptor")
        if getattr(error, "errno", None) == errno.ECONNREFUSED:
            return Answer(False, f"nothing listens on port {probe.port}")
        return Answer(False, f"{_show(probe)}: {getattr(error, 'strerror', None) or error}")


async def _get(probe: Probe, session: aiohttp.ClientSession) -> Answer:
    url = f"http://127.0.0.1:{probe.port}{probe.path}"
    async with session.get(url, headers=probe.headers, timeout=aiohttp.ClientTimeout(total=None), allow_redirects=False) as reply:
        document = await _document(reply) if reply.content_type == "application/json" else None
        return Answer(200 <= reply.status < 400, f"{_show(probe)} answered {reply.status}", document)


async def _document(reply: aiohttp.ClientResponse) -> bytes | None:
    """The body, None if it is longer than what anybody would want to read."""
    body = bytearray()
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > DOCUMENT_BYTES:
            return None
    return bytes(body)


async def _run(probe: Probe, process: Process) -> Answer:
    """The command in the container's own environment; what it has started ends with it."""
    child = await asyncio.create_subprocess_exec(
        *probe.command,
        env=process.env,
        cwd=process.cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=as_before,
    )
    try:
        status = await child.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
    return Answer(status == 0, f"{_show(probe)} ended with status {status}")


def _show(probe: Probe) -> str:
    """What is asked, without what may be a secret in it."""
    if probe.command:
        return "its command"
    return f"GET {probe.path.partition('?')[0]}" if probe.path else f"port {probe.port}"
