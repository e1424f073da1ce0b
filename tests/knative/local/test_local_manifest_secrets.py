"""What is wrong with a manifest is told without a value that may be somebody's secret."""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.local.errors import ManifestError
from knative.local.launch import check_references
from knative.local.manifest import read_manifests
from tests.knative.local.test_local_launch import env, plan
from tests.knative.local.test_local_manifest import FILE, FUNCTION, HELLO, mistake, put, secret
from tests.support import BIN, clean_environment

SOURCE = {
    "apiVersion": "sources.knative.dev/v1",
    "kind": "ContainerSource",
    "metadata": {"name": "events"},
    "spec": {"sink": {"uri": "ftp://user:geheim@host"}, "template": {"spec": {"containers": [{"name": "poll", "command": ["poll"]}]}}},
}


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        pytest.param([HELLO, secret(data={"KEY": "geheim!"})], "data.KEY: must be base64 of text", id="not in base64"),
        pytest.param([HELLO, secret(stringData={"PIN": 4711})], "stringData.PIN: Input should be a valid string (found a num", id="a PIN"),
        pytest.param([HELLO, secret(stringData={"PIN": 12345678})], "(found a number)", id="a number without quotes"),
        pytest.param([HELLO, secret(stringData={"PIN": True})], "(found true or false)", id="a word for yes"),
        pytest.param([HELLO, secret(stringData="geheim")], "(found text)", id="no object"),
        pytest.param([put((*FUNCTION, "env"), ["KEY=geheim"])], "env[0]", id="as Compose has it"),
        pytest.param([put((*FUNCTION, "env"), "KEY=geheim")], "env", id="a text for a list"),
        pytest.param([put((*FUNCTION, "env"), [{"name": "KEY=geheim"}])], "env[0].name", id="all in the name"),
        pytest.param([put((*FUNCTION, "env"), [{"name": "KEY", "value": 12345678}])], "(found a number)", id="a number in env"),
        pytest.param([put((*FUNCTION, "args"), "--key=geheim")], "args: Input should be a valid list (found text)", id="arguments as one"),
        pytest.param(
            [put((*FUNCTION, "command"), "x --key geheim --pin=geheim")], "(found 'x --key *** --pin=***')", id="a command as one"
        ),
        pytest.param(
            [put((*FUNCTION, "livenessProbe"), {"httpGet": {"httpHeaders": ["Authorization: geheim"]}})], "httpHeaders[0]", id="a header"
        ),
        pytest.param(
            [HELLO, secret(stringData={"URL": "http://queue.relight.localhost/geheim"})], "data: URL: found another address", id="a queue"
        ),
        pytest.param([HELLO, SOURCE], "found 'ftp://***@host'", id="a sink"),
    ],
)
def test_a_value_is_not_repeated(documents: list[Any], said: str) -> None:
    told = mistake(*documents)
    assert said in told
    assert not [value for value in ("geheim", "4711", "12345678") if value in told]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stringData: {KEY: *geheim}", "found undefined alias; a text that begins with * needs quotes"),
        ("stringData: {KEY: !geheim x}", "could not determine a constructor for the tag; a text that begins with ! needs quotes"),
        ("stringData: {KEY: !!int geheim}", "invalid literal for int() with base 10; put it in quotes if it is text"),
        ("stringData: {KEY: !!float geheim}", "could not convert string to float; put it in quotes if it is text"),
        ("stringData: {KEY: `geheim}", "that cannot start any token"),
    ],
)
def test_a_text_that_yaml_takes_for_something_else_is_not_repeated(text: str, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifests([(FILE, yaml.safe_dump(HELLO) + "---\n" + text)])
    assert said in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("container", "said"),
    [
        ({"env": [{"name": "KEY", "value": "gehe\0im"}]}, "env: KEY: holds a NUL character, which no process can be told"),
        ({"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "store", "key": "K"}}}]}, "env: KEY: holds a NUL"),
        ({"envFrom": [{"secretRef": {"name": "store"}}]}, "env: K: holds a NUL"),
        ({"args": ["gehe\0im"]}, "args: holds a NUL"),
        ({"command": ["x", "gehe\0im"]}, "command: holds a NUL"),
    ],
)
def test_what_no_process_can_be_told_is_told_at_once_and_not_repeated(container: dict[str, Any], said: str) -> None:
    service = copy.deepcopy(HELLO)
    service["spec"]["template"]["spec"]["containers"][0] |= container
    manifests = read_manifests([(FILE, yaml.safe_dump_all([service, secret(stringData={"K": "gehe\0im"})]))])
    with pytest.raises(ManifestError) as caught:
        check_references(manifests)
    assert str(caught.value).startswith(f"{FILE}: document 1 (Service hello): spec.template.spec.containers[0].{said}")
    assert "gehe" not in str(caught.value) + repr(manifests.secrets.keys())


def test_what_is_written_of_a_process_or_of_manifests_by_mistake_holds_no_value() -> None:
    planned = plan({"env": env(KEY="geheim"), "args": ["geheim"]}, objects=[secret(stringData={"K": "geheim"})])
    assert "geheim" not in repr(planned)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "x.yaml", "--seed", "w=s3:/u:geheim@b/x"], "must be DIR=s3://bucket/prefix"),
        (["run", "x.yaml", "--seed", "none=s3://u:geheim@b/x"], "there is no directory 'none'"),
        (["status", "--admin", "http://u:geheim@127.0.0.1:9"], "no platform answers at http://***@127.0.0.1:9"),
        (["run", "http://u:geheim@127.0.0.1:9/x.yaml"], "cannot be read"),
    ],
)
def test_no_command_repeats_a_password_of_a_url(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "relight"), *words], cwd=tmp_path, capture_output=True, text=True, env=clean_environment(), check=False
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "geheim@" not in done.stderr
