"""Bodies of requests within bounds: what they take is known before it is paid.

bytes → decompress (TooLarge, UnsupportedCoding) → scan (BadInput, TooLarge) → reserve (Unavailable) → parse (BadInput)

A document in JSON may take fifty times its length: an empty object of three bytes becomes 16 bytes of orjson's and 72 of Python's. So a
body that is not small is scanned first, chunk by chunk. No call holds the interpreter for longer than a chunk takes, and a body that is
refused costs no more memory than that.
"""

import gc
import io
import math
import random
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import orjson

from function.errors import BadInput, TooLarge, Unavailable, UnsupportedMediaType

Bytes = bytes | bytearray | memoryview

MAX_DEPTH = 200  # levels of lists and objects; an answer may add some to its input, and 254 are the most that orjson writes
SMALL_BYTES = 16 * 1024  # such a body takes less than a MB, whatever is in it
ACCEPT_ENCODING = "gzip, deflate"
_CHUNK_BYTES = 64 * 1024
_MOST_CODINGS = 2
_MOST_MEMBERS = 4096  # of a gzip body; each costs some µs, and bgzip makes one of 64 KiB at most
_BOM = b"\xef\xbb\xbf"
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}  # what a compressed body begins with

# What a document takes, seen with orjson 3.13 and CPython 3.11 (`bench/bodies.py`). While it is parsed: a copy of the text and 16 bytes for
# each value and key. From then on, with the allocator's rounding and the garbage collector's head:
_NODE_BYTES = 16
_SLOT_BYTES = 8  # in a list, for each of its values
_LIST_BYTES = 64 + 8
_OBJECT_BYTES = 64 + 120  # with a table for five keys
_KEY_BYTES = 96  # of a larger table, with the smaller one that it is copied from
_FEW_KEYS = 10
_FEW_NUMBERS = 16  # of a chunk, which may all be counted
_STRING_BYTES = 64  # with 15 ASCII characters; the same key is one string, as orjson remembers keys
_WIDE_STRING_BYTES = 80
_NUMBER_BYTES = 32  # none for the integers that CPython keeps
_KEPT_NUMBERS = frozenset(b"%d" % number for number in range(-5, 257))

_DIGITS = b"0123456789"
_OF_NUMBERS = _DIGITS + b".eE+-"
_NOT_MARKS = bytes(set(range(256)) - set(b'",:[]{}'))
_TO_LISTS = bytes.maketrans(b"{}", b"[]")
_TO_CLASSES = bytes.maketrans(_DIGITS + b"{", b"0" * 10 + b"[")
_LONG_RUN = b"0" * 19  # shorter integers are below 2**63
_INTEGER = re.compile(rb"(?<![\d.eE+-])-?\d{19,}+(?![.eE])")
_NUMBER = re.compile(rb"-?\d[\d.eE+-]*+")
_REST_OF_NUMBER = re.compile(rb"[\d.eE+-]{0,1024}+")
_INSTANCES = re.compile(rb'\s*+\{\s*+"instances"\s*+:\s*+\[')
_ASTRAL_LEADS = [bytes([lead]) for lead in range(0xF0, 0xF5)]
_LOOK_BYTES = 512  # of each chunk are looked at for what kinds of numbers and keys there are
_MOST_ROUNDS = 8


class UnsupportedCoding(UnsupportedMediaType):
    """The body's Content-Encoding is none that is understood here; the answer says in Accept-Encoding which are."""

    headers = MappingProxyType({"Accept-Encoding": ACCEPT_ENCODING})


class Reservation:
    """Memory that one request holds until it is released, which may happen more than once."""

    def __init__(self, budget: "ParseBudget | None" = None, size: int = 0) -> None:
        self._budget = budget
        self.size = size

    def shrink_to(self, size: int) -> None:
        """Give back what is beyond `size`."""
        if self._budget:
            self._budget._shrink(self, size)  # noqa: SLF001  the other half of one thing

    def release(self) -> None:
        """Give all of it back."""
        self.shrink_to(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_NOTHING = Reservation()


class ParseBudget:
    """Bytes of memory that parsed bodies may take: one request's, and those of all that are held at the moment."""

    def __init__(self, one_bytes: int, all_bytes: int) -> None:
        self.one_bytes = min(one_bytes, all_bytes)  # what never has room is too large, not a matter of waiting
        self.all_bytes = all_bytes
        self._lock = threading.Lock()  # guards _held and the sizes of its reservations
        self._held = 0

    @classmethod
    def for_bodies_of(cls, most_bytes: int) -> Self:
        """Room for two bodies of the largest size at once, numbers in nested lists, within a quarter of the container's memory."""
        one_bytes, limit = 16 * most_bytes, memory_limit()
        return cls(one_bytes, 2 * one_bytes if limit is None else min(2 * one_bytes, limit // 4))

    @property
    def held_bytes(self) -> int:
        """What is reserved now."""
        return self._held

    def reserve(self, size: int) -> Reservation:
        """`size` bytes. Raises TooLarge if one request may not have so many, Unavailable if others have them now."""
        if size > self.one_bytes:
            raise too_large(self.one_bytes)
        with self._lock:
            if has_room := self._held + size <= self.all_bytes:
                self._held += size
        if not has_room:
            raise Unavailable("the bodies of other requests take the memory that there is for them; try again", retry_after_s=1)
        return Reservation(self, size)

    def _shrink(self, reservation: Reservation, size: int) -> None:
        with self._lock:
            if size < reservation.size:
                self._held -= reservation.size - size
                reservation.size = size


def too_large(most: int) -> TooLarge:
    """The error of a body whose values take more than `most` bytes."""
    return TooLarge(f"the body's values take more than {most} bytes once parsed; send fewer of them, or tensors in binary form (V2)")


def memory_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that the container may use by its cgroup (v2); None without a limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def parse_json(data: Bytes, budget: ParseBudget | None = None, most_inputs: int | None = None) -> tuple[Any, Reservation]:
    """What a body says, and the memory that it holds of the budget, to be released when the request is answered.

    most_inputs: a longer list of "instances" that would be costly is refused before it is parsed. Other ones are the caller's to count.
    Raises BadInput, and what ParseBudget.reserve does.
    """
    if len(data) <= SMALL_BYTES:
        return _parse_small(data if isinstance(data, bytes) else bytes(data)), _NOTHING
    view = memoryview(data).cast("B")
    scan = _Scan(view[len(_BOM) :] if view[: len(_BOM)] == _BOM else view, budget.one_bytes if budget else math.inf)
    scan.run(most_inputs)
    held = budget.reserve(scan.parsing_bytes) if budget else _NOTHING
    try:
        with _uncollected():
            document = _loads(scan.data)
        if scan.deepest > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
            raise _too_deep()
    except BaseException:
        held.release()
        raise
    held.shrink_to(scan.object_bytes)
    return document, held


def _parse_small(data: bytes) -> Any:
    document = _loads(data)
    classes = data.translate(_TO_CLASSES)
    if _LONG_RUN in classes:
        _check_integers(_unescaped(data).split(b'"')[::2])
    if classes.count(b"[") > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
        raise _too_deep()
    return document


def _loads(data: bytes | memoryview) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        problem = str(error)
    # Outside of the except clause: orjson's error has the whole body, and ours would have that error.
    if data[: len(_BOM)] == _BOM:
        return _loads(memoryview(data)[len(_BOM) :])
    if problem.startswith("depth limit"):
        raise _too_deep()
    if coding := next((name for name, magic in _MAGIC.items() if bytes(data[:4]).startswith(magic)), ""):
        remedy = "; say so: Content-Encoding: gzip" if coding == "gzip" else ", which is not understood here: send it plain, or with gzip"
        raise BadInput(f"the body is not JSON, but compressed with {coding}{remedy}")
    if "UTF-8" in problem or b"\0" in bytes(data[:4]):
        raise BadInput("the body is not JSON in UTF-8; send it in this encoding")
    raise BadInput(f"the body is not JSON: {problem:.200}")


def _too_deep() -> BadInput:
    return BadInput(f"the body is nested more than {MAX_DEPTH} levels deep")


def _is_deeper(document: Any, limit: int) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(limit):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


_pauses = 0  # large bodies that are being parsed; _pause_lock guards it
_pause_lock = threading.Lock()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing of a document that is being made is garbage; to look for some again and again is three quarters of the time."""
    global _pauses, _was_collecting
    with _pause_lock:
        if not _pauses:
            _was_collecting = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _pause_lock:
            _pauses -= 1
            if not _pauses and _was_collecting:
                gc.enable()


_was_collecting = True


class _Scan:
    """What a text in JSON will take, and whether it is nested too deep or has integers that orjson would make into floats.

    What it says of a text that is no JSON holds up to the place where it ceases to be, and so far does orjson read.
    """

    def __init__(self, data: memoryview, most_bytes: float) -> None:
        self.data = data
        self.deepest = 0  # at least as many levels as there are
        self._most_bytes = most_bytes
        self._nodes = 1
        self._fixed_bytes = 0  # of objects, without the characters of strings
        self._signs = 0
        self._width = 1  # bytes that each of them takes
        self._depth = 0
        self._in_string = False

    @property
    def object_bytes(self) -> int:
        """What the document takes."""
        return self._fixed_bytes + self._signs * self._width

    @property
    def parsing_bytes(self) -> int:
        """What it takes while it is parsed."""
        return len(self.data) + self._nodes * _NODE_BYTES + self.object_bytes

    def run(self, most_inputs: int | None) -> None:
        """Raises BadInput, and TooLarge as soon as the bytes are known to be too many."""
        begin = 0
        while begin < len(self.data):
            chunk = self._chunk(begin)
            before = self.parsing_bytes
            self._add(chunk if not begin or self.data[begin - 1] not in _OF_NUMBERS else chunk.lstrip(_OF_NUMBERS))
            if not begin and most_inputs is not None and self.parsing_bytes - before > 4 * len(chunk):
                _check_inputs(chunk, most_inputs)
            if self.parsing_bytes > self._most_bytes:
                raise too_large(int(self._most_bytes))
            begin += len(chunk)

    def _chunk(self, begin: int) -> bytes:
        """The next bytes, up to the end of a number or an escape, so that none is seen in halves (but a number that nobody writes)."""
        found = _REST_OF_NUMBER.match(self.data, min(begin + _CHUNK_BYTES, len(self.data)))
        assert found
        chunk = bytes(self.data[begin : found.end()])
        is_in_escape = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2
        return bytes(self.data[begin : found.end() + 1]) if is_in_escape else chunk

    def _add(self, chunk: bytes) -> None:
        text = _unescaped(chunk)
        self._width = max(self._width, _width(text))
        if self._in_string and b'"' not in text:
            self._signs += len(chunk)
            return
        if _LONG_RUN in text.translate(_TO_CLASSES):
            _check_integers(text.split(b'"')[self._in_string :: 2])
        marks, strings, ends_in_string = _marks(text, self._in_string)
        if strings or self._in_string:
            self._signs += len(chunk)
        structure, commas = marks.translate(None, b',"'), marks.count(b",")
        self._add_depth(structure)
        self._add_values(structure, commas, strings, text)
        self._in_string = ends_in_string

    def _add_depth(self, structure: bytes) -> None:
        brackets = structure.translate(_TO_LISTS, b":")
        opened = brackets.count(b"[")
        change, rounds = 2 * opened - len(brackets), 0
        while rounds < _MOST_ROUNDS:  # each takes away the innermost level; for chains of brackets, which nobody sends, it is not worth it
            length, brackets, rounds = len(brackets), brackets.replace(b"[]", b""), rounds + 1
            if not brackets or len(brackets) > length * 3 // 4:
                break
        self.deepest = max(self.deepest, self._depth + brackets.count(b"[") + rounds)
        self._depth += change
        if self._depth > MAX_DEPTH:
            raise _too_deep()

    def _add_values(self, structure: bytes, commas: int, strings: int, text: bytes) -> None:
        keys, lists, objects = structure.count(b":"), structure.count(b"["), structure.count(b"{")
        nodes = commas + keys + lists + objects  # each but the first one is behind a comma, a colon or the bracket of its parent
        numbers = max(0, nodes - strings - lists - objects)
        made_numbers, made_keys = _shares(text, self._in_string) if keys or numbers > _FEW_NUMBERS else (1.0, 1.0)
        string_bytes = _STRING_BYTES if self._width == 1 else _WIDE_STRING_BYTES
        self._nodes += nodes
        self._fixed_bytes += (
            max(0, nodes - 2 * keys) * _SLOT_BYTES
            + lists * _LIST_BYTES
            + objects * _OBJECT_BYTES
            + max(0, keys - _FEW_KEYS * objects) * _KEY_BYTES
            + int(max(0, strings - keys + made_keys * keys) * string_bytes)
            + int(made_numbers * numbers * _NUMBER_BYTES)
        )


def _unescaped(text: bytes) -> bytes:
    """Without escapes of `\\` and `"`, so that each quote that is left begins or ends a string."""
    return text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text


def _width(text: bytes) -> int:
    """Bytes that CPython may take for each sign of a string with this text in it."""
    width = 1
    if not text.isascii():
        width = 4 if any(lead in text for lead in _ASTRAL_LEADS) else 2
    if b"\\" in text and b"u" in text and b"\\u" in text:  # to look for one byte is far faster
        width = max(width, 4 if b"\\ud" in text or b"\\uD" in text else 2)
    return width


def _marks(text: bytes, in_string: bool) -> tuple[bytes, int, bool]:
    """The marks of JSON outside of strings (perhaps with some quotes), how many strings begin, and whether the last one goes on."""
    marks = text.translate(None, _NOT_MARKS)
    if in_string:
        marks = b'"' + marks
    if b'"' not in marks:
        return marks, 0, False
    quotes = marks.count(b'"')
    if quotes % 2:
        marks = marks[: marks.rindex(b'"')]
    if marks.count(b'""') < quotes // 2:  # some strings have marks within
        marks = b"".join(marks.replace(b'""', b"").split(b'"')[::2])
    return marks, (quotes + 1) // 2 - in_string, quotes % 2 == 1


def _shares(text: bytes, in_string: bool) -> tuple[float, float]:
    """Which parts of a chunk's numbers and keys become objects of their own: those of a piece of it that nobody can foresee."""
    begin = random.randrange(max(1, len(text) - _LOOK_BYTES))
    is_within = (text.count(b'"', 0, begin) + in_string) % 2
    pieces = text[begin : begin + _LOOK_BYTES].split(b'"')
    numbers = [number for piece in pieces[is_within::2] for number in _NUMBER.findall(piece)]
    keys = [key for key, behind in zip(pieces[1 - is_within :: 2], pieces[2 - is_within :: 2], strict=False) if behind.lstrip()[:1] == b":"]
    made_numbers = sum(number not in _KEPT_NUMBERS for number in numbers) / len(numbers) if numbers else 1.0
    return made_numbers, len(set(keys)) / len(keys) if keys else 1.0


def _check_integers(pieces: list[bytes]) -> None:
    """Raises BadInput if an integer in text that is outside of strings is none that orjson keeps."""
    for found in _INTEGER.finditer(b'"'.join(pieces)):
        number = found[0]
        if len(number) > 21 or not -(2**63) <= int(number) < 2**64:
            shown = number.decode() if len(number) <= 60 else f"{number[:40].decode()}… ({len(number)} digits)"
            raise BadInput(f"the integer {shown} is beyond -2^63 to 2^64-1 and would be rounded; send it as a string, or with an exponent")


def _check_inputs(head: bytes, most: int) -> None:
    """Raises BadInput if a document that begins so has a list of more "instances"."""
    found = _INSTANCES.match(head)
    if not found:
        return
    marks, _, _ = _marks(_unescaped(head[found.end() :]), in_string=False)
    depth, commas = 0, 0
    for mark in marks:
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        elif mark in b"," and not depth:
            commas += 1
        if depth < 0 or commas >= most:
            break
    if commas >= most:
        raise BadInput(f"more than {most} inputs in one request; at most {most} (FUNCTION_MAX_INPUTS)")


def decompress(data: Bytes, coding: str, limit: int) -> bytes:
    """A body without its Content-Encoding `coding`, a list perhaps.

    Raises TooLarge if it has more than `limit` bytes, BadInput if it is damaged or ends too soon, UnsupportedCoding.
    """
    codings = [name for part in coding.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if len(codings) > _MOST_CODINGS or not {"gzip", "x-gzip", "deflate"}.issuperset(codings):
        raise UnsupportedCoding(
            f"a body with Content-Encoding {coding!r:.100} is not understood here; send it plain, or with gzip or deflate"
        )
    for name in reversed(codings):
        data = _inflate_all(memoryview(data).cast("B"), name, limit)
    return data if isinstance(data, bytes) else bytes(data)


def _inflate_all(data: memoryview, coding: str, limit: int) -> bytes:
    out, begin, members = io.BytesIO(), 0, 0  # which gives its bytes without a copy
    while begin < len(data) or not members:
        members += 1
        if begin and (coding == "deflate" or members > _MOST_MEMBERS):
            raise BadInput(f"the body goes on behind its {coding} stream, or has more than {_MOST_MEMBERS} of them")
        begin = _inflate(data, begin, _window_bits(data, coding), out, limit)
    return out.getvalue()


def _window_bits(data: memoryview, coding: str) -> int:
    """What tells zlib the format. Some send deflate without the head that RFC 9110 wants, in which no stream without one would begin so."""
    if coding != "deflate":
        return 16 + zlib.MAX_WBITS
    has_head = len(data) >= 2 and data[0] & 15 == zlib.DEFLATED and (data[0] * 256 + data[1]) % 31 == 0
    return zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS


def _inflate(data: memoryview, begin: int, window_bits: int, out: io.BytesIO, limit: int) -> int:
    """One stream's bytes go to `out`; where it ends."""
    stream = zlib.decompressobj(window_bits)
    try:
        while not stream.eof:
            piece = data[begin : begin + _CHUNK_BYTES]
            found = stream.decompress(piece, min(_CHUNK_BYTES, limit + 1 - out.tell()))
            begin += len(piece) - len(stream.unconsumed_tail) - len(stream.unused_data)
            out.write(found)
            if out.tell() > limit:
                raise TooLarge(f"the body is larger than {limit} bytes (FUNCTION_MAX_BODY_BYTES) once decompressed")
            if not piece and not found and not stream.eof:
                raise BadInput("the body ends within its compressed stream; send all of it")
    except zlib.error as error:
        raise BadInput(f"the body's compressed stream is damaged: {error!s:.100}") from None
    return begin
