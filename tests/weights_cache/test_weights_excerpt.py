"""What is told of an error: one line, of a bounded length, without secrets, whatever it is made of."""

import io
import logging
import re
import threading
import time

import pytest

from tests.support import wait_until
from weights_cache import logs
from weights_cache.environment import SettingsError, masked
from weights_cache.errors import StoreError, WeightsError
from weights_cache.excerpt import MAX_TOLD_SIGNS, described, told
from weights_cache.logs import LineFormatter, Unhurried
from weights_cache.uri import WeightsUri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:9000/x", "http://***@host:9000/x"),
        ("http://user@host/", "http://***@host/"),
        ("http://user:p@ss@host/", "http://***@host/"),
        ("https://user:pa/ss?#@host/", "https://***@host/"),
        ("s3://AKIA:SEC/RET+x@bucket/p", "s3://***@bucket/p"),
        ('Failed to connect to proxy URL: "http://user:pass@p:3128"', 'Failed to connect to proxy URL: "http://***@p:3128"'),
        ("one http://a:b@c and two http://d:e@f/", "one http://***@c and two http://***@f/"),
        ("GET http://h/a?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=abc&x=1", "GET http://h/a?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        ("?x-amz-security-token=abc", "?x-amz-security-token=***"),
        ("?AWSAccessKeyId=A&Signature=b%3D&Expires=1", "?AWSAccessKeyId=***&Signature=***&Expires=1"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AKIA/1, Signature=ab\nx", "Authorization: AWS4-HMAC-SHA256 ***\nx"),
        ("Proxy-Authorization: Basic dXNlcjpwYXNz", "Proxy-Authorization: Basic ***"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert str(StoreError(f"a {text} b")) == f"a {shown} b" or "uthorization" in text


@pytest.mark.parametrize(
    "text",
    [
        "s3://models/llama@v2/a",
        "http://host:9000/bucket/key@x",
        "http://10.0.0.1:9000/models/p@1: refused",
        "mail a@b",
        "http://host:80?x=1@2",
        "the signature of it = 7",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_an_error_is_one_line_of_a_bounded_length() -> None:
    error = WeightsError("first\nsecond\r\x1b[31m\u2028" + "x" * 100_000 + "the end")
    assert str(error).startswith("first second \\x1b[31m\\u2028x")
    assert str(error).endswith("the end")
    assert len(str(error)) == MAX_TOLD_SIGNS
    assert len(told("\x00" * 10_000)) == MAX_TOLD_SIGNS


def test_of_an_error_of_somebody_elses_the_type_is_told() -> None:
    assert described(KeyError("a")) == "KeyError: 'a'"
    assert described(MemoryError()) == "MemoryError"
    assert described(StoreError("no")) == "no"
    assert len(described(ValueError("x" * 100_000))) == MAX_TOLD_SIGNS


@pytest.mark.parametrize("piece", ["://", "://a:", "://a:b", "@", "Authorization: ", "X-Amz-Signature=", "://\x00"])
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    told(piece * 1_000_000)
    assert time.process_time() - began < 2  # a square of it would take hours


def test_a_uri_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        WeightsUri.parse("s3://AKIA:hunter2@bucket/model")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["s3://b/a\nb", "s3://b/a\x1b[31m", "s3://b/" + "a" * 1025, "s3://" + "b" * 256 + "/a", "s3://b/" + "ä" * 513]
)
def test_a_uri_that_cannot_be_told_on_a_line_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError) as caught:
        WeightsUri.parse(uri)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# The log


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(log: io.StringIO) -> logging.Logger:
    found = logging.Logger("relight.test")
    handler = logging.StreamHandler(log)
    handler.setFormatter(LineFormatter())
    found.addHandler(handler)
    return found


def test_nobody_writes_a_line_of_his_own(logger: logging.Logger, log: io.StringIO) -> None:
    logger.warning("%s is wrong", "x\n2026-01-01 00:00:00,000 INFO relight: everything is fine\r\x1b[2K")
    (line,) = log.getvalue().splitlines()
    assert line.endswith(r"WARNING relight.test: x 2026-01-01 00:00:00,000 INFO relight: everything is fine \x1b[2K is wrong")


def test_a_traceback_is_marked_as_one_and_tells_no_secret(logger: logging.Logger, log: io.StringIO) -> None:
    try:
        raise ValueError("http://a:hunter2@b/\n2026-01-01 INFO fine")
    except ValueError:
        logger.exception("failed")
    first, *rest = log.getvalue().splitlines()
    assert first.endswith("ERROR relight.test: failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert "hunter2" not in log.getvalue()


def test_another_handler_sees_the_record_as_it_was(logger: logging.Logger, log: io.StringIO) -> None:
    seen: list[logging.LogRecord] = []
    other = logging.Handler()
    other.emit = seen.append  # type: ignore[method-assign,assignment]
    logger.addHandler(other)
    logger.info("%s", "a\nb")
    assert [(record.msg, record.args) for record in seen] == [("%s", ("a\nb",))]


def test_lines_that_nobody_reads_are_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_LINES", 2)
    may_write, written = threading.Event(), io.StringIO()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            assert may_write.wait(60)
            return written.write(text)

    to = logging.StreamHandler(Slow())
    to.setFormatter(LineFormatter())
    found = Unhurried(to)
    logger = logging.Logger("relight.test")
    logger.addHandler(found)
    for number in range(10):
        logger.info("line %d", number)
    may_write.set()
    wait_until("those that are left", lambda: found._lines.empty())
    logger.info("the last")
    found.finish(60)
    lines = written.getvalue().splitlines()
    assert lines[0].endswith("line 0")
    assert sum("line " in line for line in lines) + int(re.findall(r"(\d+) lines of the log were lost", written.getvalue())[0]) == 10
    assert lines[-1].endswith("the last")


def test_a_line_of_the_log_has_no_secret_of_the_environment_whoever_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "k3y-of-the-store")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "relight")
    record = logging.makeLogRecord({"msg": "relight: %s", "args": ("the store refused k3y-of-the-store",), "levelname": "ERROR"})
    assert LineFormatter().format(record).endswith("relight: the store refused ***")
