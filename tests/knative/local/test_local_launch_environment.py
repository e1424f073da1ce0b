"""What the pods of one machine inherit of its environment, and where they listen."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from knative.local import inheritance
from knative.local.inheritance import inherited
from tests.knative.local.running import platform_running, queue_source, service
from tests.knative.local.test_local_launch import QUEUE_URL, env, plan, plan_queue_source, process
from tests.support import BIN, ROOT, clean_environment

README = (ROOT / "README.md").read_text()

SECRETS = """
    GITHUB_TOKEN HF_TOKEN OPENAI_API_KEY ANTHROPIC_API_KEY NVIDIA_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
    AWS_PROFILE GOOGLE_APPLICATION_CREDENTIALS AZURE_CLIENT_SECRET PIP_INDEX_URL UV_INDEX_URL DATABASE_URL PGPASSWORD REDIS_URL
    SSH_AUTH_SOCK KUBECONFIG DOCKER_AUTH_CONFIG VAULT_TOKEN PYTHON_KEYRING_BACKEND SECRET PATH_SECRET MY_PATH HOMEBREW_GITHUB_API_TOKEN
    HTTP_PROXY_PASSWORD BASH_FUNC_f%% SUDO_COMMAND NOTIFY_SOCKET OLDPWD
"""
OF_OTHERS = "FUNCTION_AGENT WEIGHTS_URI QUEUE_SOURCE_URL K_SINK K_SERVICE PORT MAKEFLAGS MAKELEVEL MFLAGS RELIGHT_CONTAINER"
OF_THE_MACHINE = """
    HOME USER LOGNAME SHELL TERM TZ TMPDIR LANG LC_ALL LC_CTYPE XDG_CACHE_HOME SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    LD_LIBRARY_PATH LD_PRELOAD VIRTUAL_ENV PYTHONPATH PYTHONUTF8 PYTHONDONTWRITEBYTECODE CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES
    OMP_NUM_THREADS MKL_NUM_THREADS MALLOC_ARENA_MAX HTTPS_PROXY https_proxy ALL_PROXY all_proxy
"""


@pytest.mark.parametrize("name", [*SECRETS.split(), *OF_OTHERS.split()])
def test_nothing_is_inherited_that_is_not_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "the caller's")
    for planned in plan({}, {}).processes:
        assert "the caller's" not in planned.env.values()
    assert "the caller's" not in plan_queue_source({"env": env(QUEUE_SOURCE_URL=QUEUE_URL)}).processes[0].env.values()


@pytest.mark.parametrize("name", OF_THE_MACHINE.split())
def test_what_names_a_place_or_a_resource_of_the_machine_is_inherited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "here")
    assert process().env[name] == "here"


def test_the_manifest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "C")
    monkeypatch.setenv("HF_TOKEN", "the caller's")
    assert process({"env": env(LANG="de_DE", HF_TOKEN="the manifest's")}).env.items() >= {("LANG", "de_DE"), ("HF_TOKEN", "the manifest's")}


def test_what_is_named_besides_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wanted")
    monkeypatch.setenv("HF_TOKEN_2", "not wanted")
    assert "HF_TOKEN" not in inherited()
    assert inherited(["HF_TOKEN", "NOBODY"])["HF_TOKEN"] == "wanted"
    assert not {"HF_TOKEN_2", "NOBODY"} & inherited(["HF_TOKEN", "NOBODY"]).keys()


def test_the_table_of_the_readme_is_what_is_inherited() -> None:
    table = README.partition("| inherited | |")[2].partition("\n\n")[0]
    told = set(re.findall(r"`([A-Za-z_0-9]+)`", table)) - {"PYTHONPATH"}  # which is one of a family
    assert told == {name for name in inheritance._NAMES.split() if name.isupper()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, "127.0.0.1,::1,localhost,.localhost", id="nothing was excepted"),
        pytest.param({"NO_PROXY": "intra.example, 127.0.0.1"}, "intra.example,127.0.0.1,::1,localhost,.localhost", id="what was stays"),
        pytest.param({"no_proxy": "a", "NO_PROXY": "b"}, "a,127.0.0.1,::1,localhost,.localhost", id="the lower case wins, as in curl"),
    ],
)
def test_this_machine_is_never_asked_through_a_proxy(given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://user:pass@proxy.example:3128", **given}.items():
        monkeypatch.setenv(name, value)
    assert {inherited()[name] for name in ("NO_PROXY", "no_proxy")} == {expected}
    assert inherited()["http_proxy"] == "http://user:pass@proxy.example:3128"  # whoever goes through it needs this


def test_without_a_proxy_nothing_is_said_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    assert not [name for name in inherited() if name.lower().endswith("_proxy")]


@pytest.mark.parametrize("container", [{}, {"env": env(FUNCTION_HOST="", WEIGHTS_HOST="", QUEUE_SOURCE_HOST="")}], ids=["unsaid", "empty"])
def test_our_own_programs_listen_on_loopback(container: dict[str, Any]) -> None:
    hosts = {("FUNCTION_HOST", "127.0.0.1"), ("WEIGHTS_HOST", "127.0.0.1"), ("QUEUE_SOURCE_HOST", "127.0.0.1")}
    for planned in (*plan(container, container).processes, *plan_queue_source(container).processes):
        assert planned.env.items() >= hosts


def test_our_own_programs_listen_where_the_manifest_says() -> None:
    function, sidecar = plan({"env": env(FUNCTION_HOST="0.0.0.0")}, {"env": env(WEIGHTS_HOST="::")}).processes
    assert (function.env["FUNCTION_HOST"], sidecar.env["WEIGHTS_HOST"]) == ("0.0.0.0", "::")
    assert (function.env["WEIGHTS_HOST"], sidecar.env["FUNCTION_HOST"]) == ("127.0.0.1", "127.0.0.1")


def test_it_is_the_platform_that_tells_callers_of_a_failed_start() -> None:
    assert process({"env": env(FUNCTION_TELL_FAILURE_S="10")}).env["FUNCTION_TELL_FAILURE_S"] == "0"
    assert "FUNCTION_TELL_FAILURE_S" not in process().env


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_python_is_the_one_that_the_packages_are_installed_for(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    found = shutil.which("python", path=process().env["PATH"])
    assert found
    assert Path(found).parent == Path(sys.executable).parent
    assert process().env["PATH"].endswith(path or os.defpath)


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        pytest.param("GEHEIM=abc123", "name the variable alone, as in --env GEHEIM", id="with its value"),
        pytest.param("NOBODY_HAS_SET_THIS", "NOBODY_HAS_SET_THIS is not set here", id="one that is not set"),
    ],
)
def test_what_env_cannot_be_is_refused_without_a_value(said: str, refusal: str, tmp_path: Path) -> None:
    words = [str(BIN / "relight"), "run", str(tmp_path / "none.yaml"), "--env", said]
    done = subprocess.run(words, capture_output=True, text=True, env=clean_environment(GEHEIM="abc123"), check=False)
    assert done.returncode == 2
    assert refusal in done.stderr
    assert "abc123" not in done.stderr


def test_processes_of_a_platform_have_no_token_of_its_own_and_what_is_named(tmp_path: Path) -> None:
    """Nor a sidecar, a queue source, or a probe that is a command."""
    tell = ["sh", "-c", 'env > "$NOTES/$0.new" && mv "$NOTES/$0.new" "$NOTES/$0"; exec sleep 600', "sidecar"]
    mount = {"env": env(NOTES="/notes"), "volumeMounts": [{"name": "notes", "mountPath": "/notes"}]}
    probe = {"startupProbe": {"exec": {"command": ["sh", "-c", 'env > "$NOTES/probe"']}}}
    echo = service("echo", {"name": "sidecar", "command": tell, **mount}, container=probe)
    source = queue_source("work", "echo", command=("sh", "-c", f"env > {tmp_path}/source; exec python -m knative.queue_source"))
    tokens = {"GITHUB_TOKEN": "ghp_secret", "HF_TOKEN": "hf_secret", "WANTED": "wanted"}
    with platform_running(tmp_path / "state", [echo, source], "--env", "WANTED", **tokens) as platform:
        assert platform.call("echo").status == 200
        notes = [platform.volume("echo") / "sidecar", platform.volume("echo") / "probe", tmp_path / "source"]
        told = [note.read_text() for note in notes]
    for text in told:
        assert "WANTED=wanted" in text
        assert "secret" not in text.replace("AWS_SECRET_ACCESS_KEY=relight-local", "")
