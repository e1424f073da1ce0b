"""What is repeated of a value, and what never is."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.support import ROOT, clean_environment
from weights_cache.environment import SettingsError, hiding, masked, read, setting, told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("http://user:pass@host/x", "http://***@host/x", id="a password"),
        pytest.param("amqp://pass@host", "amqp://***@host", id="a token in its place"),
        pytest.param("http:/user:pass@host/x", "http:/***@host/x", id="what has become a path"),
        pytest.param("http://:pass@host", "http://***@host", id="no user"),
        pytest.param("https://user:p@ss@host:1/x@y", "https://***@y", id="a sign in it that should be escaped"),
        pytest.param("http://user:pa/ss@host", "http://***@host", id="another one"),
        pytest.param("no http://a:b@c and amqp://d:e@f/v.", "no http://***@c and amqp://***@f/v.", id="more than one"),
        pytest.param("['http://a:b@c', \"http://d:e@f\"]", "['http://***@c', \"http://***@f\"]", id="in quotes"),
        pytest.param("s3://AKIA123:secret/key@bucket/p", "s3://***@bucket/p", id="another scheme"),
        pytest.param("https://s3/b?X-Amz-Signature=abc&x=1", "https://s3/b?X-Amz-Signature=***&x=1", id="a signed URL"),
        pytest.param("sent X-Amz-Credential=a/b, AWSAccessKeyId=c", "sent X-Amz-Credential=*** AWSAccessKeyId=***", id="parts of one"),
        pytest.param("https://h/?a=1&access_token=abc#f", "https://h/?a=1&access_token=***#f", id="a token in a query"),
        pytest.param("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***", id="a header"),
        pytest.param("{'Proxy-Authorization': 'Basic dXNl'}", "{'Proxy-Authorization': 'Basic ***'}", id="a proxy's header"),
        pytest.param("got Bearer abc.def", "got Bearer ***", id="a bearer"),
    ],
)
def test_credentials_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b",
        "http://host:8080",
        "http://host:8080?a=b@c",
        "http://[::1]:80/x@y",
        "https://a.example/@x:y",
        "write to me@host.example, not http://host.example",
        "https://h/?page=1&tokens=5&max_tokens=7",
        "s3://bucket/prefix#0123",
        "12:30 a://b",
        "file:/a/b@c",
        "x:/a@b",
    ],
)
def test_what_only_resembles_them_is_left(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("piece", ["://", "://a", "://a:", "?token", "&sig", "bearer ", "://a:b"])
def test_a_long_text_is_masked_in_time_that_grows_with_its_length(piece: str) -> None:
    """By the number of steps would be better, but nothing counts them: a text that took seconds would take hours at this length."""
    assert masked(piece * 100_000).startswith(piece[:3])


@pytest.mark.parametrize(
    ("name", "value", "text", "expected"),
    [
        pytest.param("HF_TOKEN", "hf_abcdef", "no hf_abcdef here", "no *** here", id="a token"),
        pytest.param("AWS_SECRET_ACCESS_KEY", "a/b+c=d/e", "x=a/b+c=d/e", "x=***", id="a key with signs of patterns"),
        pytest.param("MY_API_KEY_2", "geheim", "geheim", "***", id="a name that goes on"),
        pytest.param("X_HEADERS", "x-key: geheim1", "x-key: geheim1", "***", id="all of the headers"),
        pytest.param("X_HEADERS", "a=geheim1,b=c", "got geheim1", "got ***", id="one of the headers"),
        pytest.param("HF_TOKEN", "short", "a short text", "a short text", id="what stands in many a word"),
        pytest.param("FUNCTION_API_KEYS_FILE", "/etc/keys", "/etc/keys", "/etc/keys", id="where a secret lies"),
        pytest.param("TOKENIZERS_PARALLELISM", "parallel", "parallel", "parallel", id="another word"),
        pytest.param("PATH", "/usr/bin", "/usr/bin", "/usr/bin", id="no secret"),
        pytest.param("HF_TOKEN", "", "http://a:b@c", "http://***@c", id="none"),
    ],
)
def test_what_the_environment_calls_a_secret_is_hidden(name: str, value: str, text: str, expected: str) -> None:
    assert hiding({name: value, "LANG": "C"})(text) == expected


@dataclass(frozen=True)
class Demo:
    """For these tests."""

    size: int = setting("DEMO_SIZE", 1, text="how large")
    keys: str | None = setting("DEMO_KEYS", None, text="a file")


@pytest.mark.parametrize("name", ["DEMO_API_KEY", "DEMO_TOKEN", "DEMO_SZIE", "DEMO_X"])
def test_the_value_of_a_name_that_is_not_known_is_not_repeated(name: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        read(Demo, {name: "sk-1234567890abcdef"}, prefix="DEMO_")
    assert str(wrong.value).startswith(f"{name}: there is no such setting; ")
    assert "sk-" not in str(wrong.value)


@pytest.mark.parametrize("value", ["8", "-1.5", "true", "Off"])
def test_a_number_and_a_word_for_yes_or_no_is_no_secret(value: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        read(Demo, {"DEMO_SZIE": value}, prefix="DEMO_")
    assert str(wrong.value) == f"DEMO_SZIE={value!r}: there is no such setting; did you mean DEMO_SIZE?"


def test_a_value_is_repeated_masked_and_short() -> None:
    with pytest.raises(SettingsError) as wrong:
        read(Demo, {"DEMO_SIZE": "http://user:pass@host" + "x" * 10_000}, prefix="DEMO_")
    assert str(wrong.value).startswith("DEMO_SIZE='http://***@hostxxx")
    assert len(str(wrong.value)) < 200
    assert (told("x"), told("user:pass@host"), told("a@b"), told("http://h:1/a@b")) == ("'x'", "'***@host'", "'a@b'", "'http://h:1/a@b'")


def test_whatever_a_settings_error_says_is_masked() -> None:
    assert str(SettingsError("WEIGHTS_URI='s3://user:pass@bucket'")) == "WEIGHTS_URI='s3://***@bucket'"


@pytest.mark.parametrize(
    ("program", "environment"),
    [
        (("function",), {"FUNCTION_AGENT": "function.agents.echo:Echo", "FUNCTION_API_KEY": "sk-secret"}),
        (("function",), {"FUNCTION_AGENT": "function.agents.echo:Echo", "FUNCTION_API_KEYS_FILE": "sk-secret"}),
        (("function",), {"FUNCTION_AGENT": "function.agents.echo:Echo", "WEIGHTS_URI": "s3://user:sk-secret@b"}),
        (("function",), {"FUNCTION_AGENT": "function.agents.echo:Echo", "FUNCTION_CORS_ORIGINS": "https://user:sk-secret@b/x"}),
        (("weights_cache", "serve"), {"WEIGHTS_TOKEN": "sk-secret"}),
        (("knative.queue_source",), {"QUEUE_SOURCE_PASSWORD": "sk-secret"}),
        (("knative.queue_source",), {"QUEUE_SOURCE_URL": "amqp://user:sk-secret@h/q", "K_SINK": "ftp://user:sk-secret@h"}),
    ],
)
def test_no_program_says_a_secret_when_it_refuses_its_settings(program: tuple[str, ...], environment: dict[str, str]) -> None:
    words = [sys.executable, "-m", *program]
    env = clean_environment(PYTHONPATH=str(ROOT), **environment)
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.strip()
    assert "sk-secret" not in done.stdout + done.stderr
