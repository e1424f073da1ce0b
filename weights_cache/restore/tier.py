"""The resident tier as a function sees it: memory to attach instead of restoring, and to leave behind after restoring."""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from weights_cache.errors import WeightsError
from weights_cache.resident import MAX_MESSAGE_BYTES, SOCKET
from weights_cache.restore.device import Device, Shared
from weights_cache.restore.layout import Placed

log = logging.getLogger("relight.weights")

ANSWER_S = 2.0  # an agent that takes longer is stuck; restoring takes about as long


class Tier:
    """A connection to the node's agent; while it lives, what was attached or left through it is not evicted.

    Whatever goes wrong with it is a warning, and the weights are restored as if there were none.
    """

    def __init__(self, connection: socket.socket, uri: str, *, keeps: bool) -> None:
        """keeps: whether weights may be attached and left; otherwise room can be asked for, and that is all. uri: for people."""
        self._connection = connection
        self._uri = uri
        self._keeps = keeps

    @classmethod
    def open(cls, folder: Path, uri: str, *, keeps: bool) -> "Tier | None":
        """The tier whose agent listens in `folder`, None if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(str(folder / SOCKET))
        except OSError as error:
            connection.close()
            if keeps:
                log.warning("weights cannot stay on a device, for no agent answers in %s: %s", folder / SOCKET, error)
            return None
        return cls(connection, uri, keeps=keeps)

    def __del__(self) -> None:
        self._connection.close()

    def takes(self, device: Device) -> bool:
        """Whether weights on `device` may be attached and left."""
        return self._keeps and device.identity() is not None

    def attach(self, key: str, device: Device, size: int) -> Tensor | None:
        """The bytes that an earlier function left under `key`, None if there are none."""
        answer, descriptor = self._ask(do="attach", key=key, device=device.identity())
        if descriptor is None:
            return None
        try:
            if answer.get("bytes") != size:
                raise WeightsError(f"{answer.get('bytes')} bytes were left where {size} are wanted")
            return device.adopt(descriptor, size)
        except (WeightsError, MemoryError, OSError) as error:
            log.warning("what stayed on %s cannot be attached: %s", device.name, error)
            self._ask(do="drop", key=key, device=device.identity())
            return None
        finally:
            os.close(descriptor)

    def keep(self, key: str, device: Device, memory: Shared) -> None:
        """Leave what is in `memory`, which nobody writes to any more."""
        try:
            memory.seal()
        except (WeightsError, OSError) as error:
            log.warning("weights that stay on %s can be written to by this function: %s", device.name, error)
        try:
            descriptor = memory.descriptor()
        except (WeightsError, MemoryError, OSError) as error:
            log.warning("weights cannot stay on %s: %s", device.name, error)
            return
        try:
            size = memory.tensor.nbytes
            self._ask(descriptor, do="keep", key=key, device=device.identity(), bytes=size, uri=self._uri)
        finally:
            os.close(descriptor)

    def make_room(self, device: Device, size: int) -> int:
        """Have `size` bytes of what nobody uses on `device` let go of; returns how many it were."""
        if device.identity() is None:
            return 0
        answer, _ = self._ask(do="make_room", device=device.identity(), bytes=size)
        return int(answer.get("freed", 0))

    def _ask(self, given: int | None = None, **message: Any) -> tuple[dict[str, Any], int | None]:
        """The answer, and the descriptor that came with it; nothing if there is no answer, now and for good."""
        if self._connection.fileno() < 0:
            return {}, None
        try:
            socket.send_fds(self._connection, [json.dumps(message).encode()], [] if given is None else [given])
            data, descriptors, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            answer: dict[str, Any] = json.loads(data) if data else {"error": "it has gone"}
        except (OSError, ValueError) as error:
            return self._give_up(error)
        if "error" in answer:
            return self._give_up(answer["error"])
        return answer, descriptors[0] if descriptors else None

    def _give_up(self, why: object) -> tuple[dict[str, Any], None]:
        log.warning("the resident tier does not answer: %s", why)
        self._connection.close()
        return {}, None


def key(version: str, placed: Sequence[Placed]) -> str:
    """What is in an allocation, in a word: the file's content (`version`), and where which of its tensors are, as what."""
    layout = [(one.info.name, one.info.start, str(one.file_dtype), str(one.dtype), one.shape, one.at, one.size) for one in placed]
    return hashlib.sha256(json.dumps([version, layout]).encode()).hexdigest()
