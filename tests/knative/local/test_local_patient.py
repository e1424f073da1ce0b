"""The terminal of a platform may be full, stopped or gone: nothing waits for it, and nothing fails."""

import asyncio
import logging
import os
import pty
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

import pytest

from knative.local.patient import BACKLOG_BYTES, PatientStream
from knative.local.plain import BAR, record

LINE = "12:00:00 hello something has happened\n"


class Pipe:
    """Both ends of one, the written one as a stream."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.reads, writes = os.pipe()
        self.stream: TextIO = os.fdopen(writes, "w", encoding=encoding)  # closed by the fixture

    def read(self) -> str:
        return os.read(self.reads, 1 << 20).decode()

    def hang_up(self) -> None:
        os.close(self.reads)
        self.reads = -1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.stream.close()
    if made.reads >= 0:
        made.hang_up()


def test_a_pipe_that_nobody_reads_holds_nothing_up_and_loses_nothing_that_is_bounded(pipe: Pipe) -> None:
    async def scenario() -> str:
        terminal = PatientStream(pipe.stream)
        lines = [f"{number} {LINE}" for number in range(5000)]  # three times what the pipe holds, without a wait
        for line in lines:
            terminal.write(line)
        said, wanted = "", "".join(lines)
        while len(said) < len(wanted):
            said += await asyncio.to_thread(pipe.read)
        assert said == wanted
        await asyncio.sleep(0)
        terminal.write("and on\n")
        return pipe.read()

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == "and on\n"


def test_what_is_kept_for_a_reader_is_bounded_and_what_is_left_out_is_counted(pipe: Pipe) -> None:
    async def scenario() -> None:
        terminal = PatientStream(pipe.stream)
        for _ in range(50_000):
            terminal.write(LINE)
        assert terminal._size <= BACKLOG_BYTES + len(LINE)
        said = ""
        while "left out" not in said:
            said += await asyncio.to_thread(pipe.read)
        kept = said.count(LINE)
        assert said.endswith(f"{LINE}… {50_000 - kept} lines were left out: nobody read them\n")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_reader_who_went_away_is_no_error(pipe: Pipe) -> None:
    terminal = PatientStream(pipe.stream)
    pipe.hang_up()
    for _ in range(3):
        assert terminal.write(LINE) == len(LINE)
    terminal.close()
    assert terminal._size == terminal._left_out == 0 or terminal._is_gone


def test_a_full_disk_is_no_error() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        terminal = PatientStream(full)
        terminal.write(LINE)
        assert not terminal._is_gone
        assert not terminal._waiting


def test_a_stopped_terminal_holds_nothing_up() -> None:
    async def scenario() -> None:
        ours, theirs = pty.openpty()
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            terminal = PatientStream(stream)
            termios.tcflow(theirs, termios.TCOOFF)  # Ctrl-S
            for _ in range(2000):
                terminal.write(LINE)
            assert terminal._waiting
            termios.tcflow(theirs, termios.TCOON)
            said = b""
            while said.count(b"\n") < 2000:
                said += await asyncio.to_thread(os.read, ours, 65536)
            while terminal._waiting:
                await asyncio.sleep(0)
        os.close(ours)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_signs_that_the_stream_has_no_code_for_are_escaped() -> None:
    pipe = Pipe("latin-1")
    terminal = PatientStream(pipe.stream)
    terminal.write("● grün │\n")
    assert os.read(pipe.reads, 100) == "\\u25cf grün \\u2502\n".encode("latin-1")
    pipe.stream.close()
    pipe.hang_up()


def test_the_last_words_are_waited_for_a_little(pipe: Pipe) -> None:
    async def scenario() -> str:
        terminal = PatientStream(pipe.stream)
        while not terminal._waiting:
            terminal.write(LINE)
        reading = asyncio.get_running_loop().run_in_executor(None, pipe.read)
        terminal.close()
        terminal.write("stopped\n")
        said = await reading
        with suppress(BlockingIOError):
            os.set_blocking(pipe.reads, False)
            said += pipe.read()
        return said

    assert asyncio.run(asyncio.wait_for(scenario(), 60)).endswith("stopped\n")


def test_what_libraries_log_is_set_off_and_escaped(pipe: Pipe) -> None:
    handler = logging.StreamHandler(cast(TextIO, PatientStream(pipe.stream, record)))
    try:
        raise ValueError("\x1b[2J\n12:00:00 hello ready")
    except ValueError:
        handler.emit(logging.LogRecord("aiohttp", logging.ERROR, "", 0, "Error handling %s", ("\x9b\u202e",), sys.exc_info()))
    first, *rest = pipe.read().splitlines()
    assert first == r"Error handling \x9b\u202e"
    assert all(line.startswith(BAR) for line in rest)
    assert rest[-2:] == [rf"{BAR}ValueError: \x1b[2J", f"{BAR}12:00:00 hello ready"]
