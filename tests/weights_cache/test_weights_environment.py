"""Settings from environment variables: typed, bounded, and strict about names."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from weights_cache import environment
from weights_cache.environment import SettingsError, setting
from weights_cache.settings import WeightsSettings


@dataclass(frozen=True)
class Demo:
    uri: str = setting("DEMO_URI", text="where the demo is")
    name: str | None = setting("DEMO_NAME", None, text="what it is called")
    size: int = setting("DEMO_SIZE", 8, minimum=1, maximum=64, text="how large it is")
    limit: int | None = setting("DEMO_LIMIT", None, minimum=0, text="how large it may become")
    ratio: float = setting("DEMO_RATIO", 0.5, minimum=0, maximum=1, text="its ratio")
    fast: bool = setting("DEMO_FAST", False, text="whether it hurries")
    folder: Path = setting("DEMO_FOLDER", Path("/nowhere"), text="where it keeps things")
    mode: str = setting("DEMO_MODE", "after", choices=("after", "before"), text="when it looks")


def read(environ: Mapping[str, str]) -> Demo:
    return environment.read(Demo, {"DEMO_URI": "here", **environ}, prefix="DEMO_")


def refusal(environ: Mapping[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        read(environ)
    return str(caught.value)


def test_what_is_not_set_has_its_default() -> None:
    assert read({}) == Demo(uri="here")


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read({"DEMO_SIZE": "", "DEMO_NAME": ""}) == Demo(uri="here")


@pytest.mark.parametrize(
    ("name", "raw", "field", "value"),
    [
        pytest.param("DEMO_NAME", "Ann", "name", "Ann", id="text"),
        pytest.param("DEMO_SIZE", "1", "size", 1, id="whole number, at its lower bound"),
        pytest.param("DEMO_SIZE", "64", "size", 64, id="whole number, at its upper bound"),
        pytest.param("DEMO_LIMIT", "5", "limit", 5, id="a number that may be absent"),
        pytest.param("DEMO_RATIO", "0.25", "ratio", 0.25, id="number"),
        pytest.param("DEMO_FOLDER", "/tmp/x", "folder", Path("/tmp/x"), id="path"),  # noqa: S108  nothing is written there
        pytest.param("DEMO_MODE", "before", "mode", "before", id="choice"),
        pytest.param("DEMO_FAST", "true", "fast", True, id="true"),
        pytest.param("DEMO_FAST", "1", "fast", True, id="1"),
        pytest.param("DEMO_FAST", "Yes", "fast", True, id="Yes"),
        pytest.param("DEMO_FAST", "off", "fast", False, id="off"),
        pytest.param("DEMO_FAST", "FALSE", "fast", False, id="FALSE is not the truth of a text"),
    ],
)
def test_a_value_has_the_type_of_its_field(name: str, raw: str, field: str, value: object) -> None:
    found = getattr(read({name: raw}), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "raw", "bound"),
    [
        pytest.param("DEMO_SIZE", "0", "at least 1 and at most 64", id="below"),
        pytest.param("DEMO_SIZE", "65", "at least 1 and at most 64", id="above"),
        pytest.param("DEMO_SIZE", "8.5", "a whole number", id="a fraction"),
        pytest.param("DEMO_SIZE", "many", "a whole number", id="a word"),
        pytest.param("DEMO_LIMIT", "-1", "at least 0", id="below a single bound"),
        pytest.param("DEMO_RATIO", "nan", "at least 0 and at most 1", id="not a number at all"),
        pytest.param("DEMO_RATIO", "half", "a number", id="a word for a number"),
        pytest.param("DEMO_FAST", "maybe", "true or false", id="neither true nor false"),
        pytest.param("DEMO_MODE", "never", "one of after, before", id="not a choice"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_value_and_bound(name: str, raw: str, bound: str) -> None:
    assert refusal({name: raw}) == f"{name}={raw!r}: must be {bound}"


def test_a_missing_value_without_default_is_named_with_its_meaning() -> None:
    with pytest.raises(SettingsError, match=r"^DEMO_URI is not set: where the demo is$"):
        environment.read(Demo, {}, prefix="DEMO_")


def test_a_misspelt_name_is_refused_with_the_nearest_one() -> None:
    assert refusal({"DEMO_SZIE": "8"}) == "DEMO_SZIE='8': there is no such setting; did you mean DEMO_SIZE?"


def test_a_name_that_resembles_nothing_is_refused_with_all_that_are_known() -> None:
    told = refusal({"DEMO_SOMETHING_ELSE_ALTOGETHER": "8"})
    assert "there is no such setting" in told
    assert all(field.metadata["env"] in told for field in dataclasses.fields(Demo))


def test_variables_with_another_prefix_are_somebody_elses() -> None:
    assert read({"DEMONS_SIZE": "0", "OTHER_DEMO_SIZE": "0", "demo_size": "0"}) == Demo(uri="here")


@pytest.mark.parametrize(
    "name",
    [
        "DEMO_SERVICE_HOST",
        "DEMO_SERVICE_PORT",
        "DEMO_SERVICE_PORT_HTTP",
        "DEMO_WEB_PORT",
        "DEMO_PORT_8080_TCP",
        "DEMO_PORT_8080_TCP_PROTO",
        "DEMO_WEB_PORT_53_UDP_ADDR",
    ],
)
def test_what_kubernetes_injects_for_a_service_of_that_name_is_ignored(name: str) -> None:
    assert read({name: "tcp://10.0.0.1:8080"}) == Demo(uri="here")


@pytest.mark.parametrize("name", ["DEMO_SERVICE", "DEMO_PORTS", "DEMO_PORT_HTTP", "DEMO_SERVICE_HOSTNAME"])
def test_what_only_looks_like_that_is_still_a_misspelt_name(name: str) -> None:
    assert "there is no such setting" in refusal({name: "x"})


def test_the_weights_settings_are_read_from_their_variables() -> None:
    environ = {"WEIGHTS_URI": "s3://b/m", "WEIGHTS_CACHE_DIR": "/c", "WEIGHTS_PORT": "9000", "WEIGHTS_PART_BYTES": "1048576", "HOME": "/"}
    environ |= {"WEIGHTS_REVALIDATE": "before", "WEIGHTS_CACHE_BYTES": "0", "WEIGHTS_BYTES_PER_SECOND": "5"}
    assert environment.read(WeightsSettings, environ, prefix="WEIGHTS_") == WeightsSettings(
        uri="s3://b/m",
        cache_dir=Path("/c"),
        host="0.0.0.0",
        port=9000,
        revalidate="before",
        cache_bytes=0,
        connections=16,
        part_bytes=1 << 20,
        bytes_per_second=5,
    )


def test_every_default_of_the_weights_settings_is_within_its_own_bounds() -> None:
    defaults = {field.metadata["env"]: str(field.default) for field in dataclasses.fields(WeightsSettings) if field.default is not None}
    assert environment.read(WeightsSettings, defaults, prefix="WEIGHTS_") == WeightsSettings()
