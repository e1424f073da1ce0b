"""Bodies as they come: in any segments, in any chunks, and in what is no body at all."""

import itertools
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.errors import TooLarge, Unavailable
from function.incoming import Body, ChunkedBody

LIMIT = 10_000


def chunked(pieces: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    return b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces if piece) + b"0\r\n" + trailers + b"\r\n"


def fed(body: Body, data: bytes, cuts: list[int]) -> bytes:
    """What is behind the body, which comes in segments that end at these places."""
    rest, edges = b"", [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        rest += data[begin:end] if body.is_whole else body.feed(data[begin:end])
    return rest


@given(st.binary(max_size=300), st.binary(max_size=50), st.lists(st.integers(0, 1000), max_size=8))
def test_a_body_of_known_length_is_the_same_in_any_segments(content: bytes, behind: bytes, cuts: list[int]) -> None:
    body = Body(len(content), LIMIT)
    assert fed(body, content + behind, cuts) == behind
    assert (body.is_whole, body.error, body.size) == (True, None, len(content))
    assert body.take() == content


@given(
    st.lists(st.binary(max_size=60), max_size=12),
    st.sampled_from([b"", b";a=b", b' ; a="b c"', b"\t"]),
    st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC: d\r\n"]),
    st.binary(max_size=50),
    st.lists(st.integers(0, 3000), max_size=12),
)
def test_a_chunked_body_is_the_same_in_any_chunks_and_segments(
    pieces: list[bytes], extension: bytes, trailers: bytes, behind: bytes, cuts: list[int]
) -> None:
    body = ChunkedBody(LIMIT)
    assert fed(body, chunked(pieces, extension, trailers) + behind, cuts) == behind
    assert (body.is_whole, body.error) == (True, None)
    assert body.take() == b"".join(pieces)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_no_junk_is_more_than_an_error(junk: bytes, cuts: list[int]) -> None:
    body = ChunkedBody(LIMIT)
    fed(body, junk, cuts)
    assert body.error is None or (body.is_whole and body.error.status in (400, 413) and body.error.ends_connection)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"-1\r\n", 400),
        (b"+1\r\na\r\n", 400),
        (b"0x1\r\na\r\n", 400),
        (b" 1\r\na\r\n", 400),
        (b"\r\n", 400),
        (b"1_0\r\n", 400),
        (b"1\na\r\n0\r\n\r\n", 400),
        (b"1\r\nab\r\n", 400),
        (b"3\r\nab\r\n0\r\n\r\n", 400),
        (b"1;\x00\r\na\r\n", 400),
        (b"1;" + b"a" * 5000, 400),
        (b"0\r\n" + b"A: " + b"b" * 20_000, 400),
        (b"fffffffffffffffff\r\n", 400),  # more digits than any length has
        (b"fffffff\r\n", 413),
        (b"2710\r\n" + b"a" * 10_000 + b"\r\n1\r\n", 413),
    ],
)
def test_chunks_that_lie_are_an_error(sent: bytes, status: int) -> None:
    for segments in ([sent], [sent[at : at + 1] for at in range(len(sent))]):
        body = ChunkedBody(LIMIT)
        for segment in segments:
            if not body.is_whole:
                body.feed(segment)
        assert body.error
        assert (body.error.status, body.take()) == (status, b"")


def test_a_body_beyond_the_limit_is_known_by_its_length_alone() -> None:
    body = Body(LIMIT + 1, LIMIT)
    assert body.is_whole
    assert isinstance(body.error, TooLarge)


def test_what_was_kept_is_forgotten_when_it_fails() -> None:
    body = Body(LIMIT, LIMIT)
    body.feed(b"a" * 5000)
    body.fail(Unavailable("no", retry_after_s=1))
    assert (body.is_whole, body.size, body.take()) == (True, 0, b"")


def test_small_chunks_take_no_more_memory_than_their_bytes() -> None:
    sent = chunked([b"ab"] * 100_000)
    body = ChunkedBody(1 << 20)
    tracemalloc.start()
    for at in range(0, len(sent), 65536):
        body.feed(sent[at : at + 65536])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert body.take() == b"ab" * 100_000
    assert most < 2_000_000  # 200 kB, while they grow, and a segment; an object for each chunk would be 5 MB


def test_time_is_by_the_number_of_chunks_however_many_come_together() -> None:
    def seconds(count: int) -> float:
        sent = chunked([b"ab"] * count)
        began = time.process_time()
        body = ChunkedBody(1 << 20)
        body.feed(sent)
        assert body.is_whole
        return time.process_time() - began

    few = min(seconds(4_000) for _ in range(5))
    assert min(seconds(64_000) for _ in range(3)) < few * 16 * 4  # 16 times the chunks; by their square it would be 256 times
