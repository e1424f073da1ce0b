"""What the function does with its environment."""

import dataclasses
import os

import pytest

from function import cpus
from function.settings import FunctionSettings
from weights_cache.environment import SettingsError, read


def settings(**environ: str) -> FunctionSettings:
    return read(FunctionSettings, {"FUNCTION_AGENT": "a:B", **environ}, prefix="FUNCTION_")


def test_defaults_stand_where_nothing_is_set() -> None:
    found = settings()
    assert (found.port, found.timeout_s, found.device, found.model_name) == (8080, 30.0, "cpu", "model")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        pytest.param({"FUNCTION_AGNET": "x"}, "did you mean FUNCTION_AGENT?", id="a misspelt name"),
        pytest.param({"FUNCTION_TIMEOUT_S": "soon"}, "FUNCTION_TIMEOUT_S='soon': must be a number", id="not a number"),
        pytest.param({"FUNCTION_TIMEOUT_S": "nan"}, "FUNCTION_TIMEOUT_S='nan': must be at least 0.001", id="not even nan"),
        pytest.param({"FUNCTION_QUEUE_LIMIT": "0"}, "FUNCTION_QUEUE_LIMIT='0': must be at least 1", id="below its bound"),
        pytest.param({"FUNCTION_QUEUE_LIMIT": "1.5"}, "must be a whole number", id="not whole"),
        pytest.param({"PORT": "70000"}, "PORT='70000': must be at least 0 and at most 65535", id="beyond its bound"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value_and_what_is_allowed(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings(**environ)
    assert said in str(error.value)


def test_the_agent_has_no_default() -> None:
    with pytest.raises(SettingsError, match="FUNCTION_AGENT is not set"):
        read(FunctionSettings, {}, prefix="FUNCTION_")


def test_what_kubernetes_injects_for_a_service_named_function_is_no_typo() -> None:
    injected = {
        "FUNCTION_SERVICE_HOST": "10.0.0.1",
        "FUNCTION_SERVICE_PORT": "80",
        "FUNCTION_SERVICE_PORT_HTTP1": "80",
        "FUNCTION_PORT": "tcp://10.0.0.1:80",
        "FUNCTION_PORT_80_TCP": "tcp://10.0.0.1:80",
        "FUNCTION_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert settings(**injected) == settings()


@pytest.mark.parametrize(("said", "becomes"), [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_compute_together_do_not_spin_for_long_unless_told_to(
    said: dict[str, str], becomes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", said.copy())
    cpus.limit_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == becomes
