"""What one pod of a Service is on this machine: commands, environments, directories, ports, probes."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.local.errors import ManifestError, PlatformError
from knative.local.launch import Places, PodPlan, Probe, Process, plan_pod, plan_source
from knative.local.limits import Limits
from knative.local.manifest import OBJECT_STORE, QUEUES, read_manifests
from knative.local.seeds import Seed, Seeds

STATE = Path("/state")
STORE = "http://127.0.0.1:9999"
CLAIM = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
SCRATCH = {"name": "scratch", "emptyDir": {}}
FIRST_PORT = 50000  # the pods of these tests get this one and those after it

FLAGS = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "flags"}, "data": {"COLOUR": "blue", "SIZE": "small"}}
KEYS = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"TOKEN": "geheim"}}


def plan(
    container: Mapping[str, Any] | None = None,
    *sidecars: Mapping[str, Any],
    volumes: Sequence[Mapping[str, Any]] = (),
    objects: Sequence[Mapping[str, Any]] = (),
    pod: str = "hello-1",
    state: Path = STATE,
    seeds: Seeds | None = None,
) -> PodPlan:
    """One pod of a Service that has these containers; `container` is the one that is called."""
    main = {"name": "function", "command": ["serve"], "ports": [{"containerPort": 8080}], **(container or {})}
    others = [{"name": f"sidecar-{number}", "command": ["help"], **sidecar} for number, sidecar in enumerate(sidecars)]
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "hello"},
        "spec": {"template": {"spec": {"containers": [main, *others], "volumes": list(volumes)}}},
    }
    manifests = read_manifests([("hello.yaml", yaml.safe_dump_all([service, *objects]))])
    return plan_pod(
        manifests.services[0],
        revision="hello-00001",
        pod=pod,
        places=Places(state),
        manifests=manifests,
        free_port=itertools.count(FIRST_PORT).__next__,
        addresses={OBJECT_STORE: STORE},
        seeds=seeds,
    )


def process(container: Mapping[str, Any] | None = None, **options: Any) -> Process:
    """The process of the container that is called."""
    return plan(container, **options).processes[0]


def env(**variables: str) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def mounts(**paths: str) -> list[dict[str, str]]:
    return [{"name": name, "mountPath": path} for name, path in paths.items()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("/models", "/state/volumes/default/models", id="the mount itself"),
        pytest.param("/models/a/b.bin", "/state/volumes/default/models/a/b.bin", id="a file below it"),
        pytest.param("/models/", "/state/volumes/default/models/", id="with a slash at its end"),
        pytest.param("/models/scratch/x", "/state/pods/hello-1/volumes/scratch/x", id="the deepest mount counts"),
        pytest.param("/models-old/a", "/models-old/a", id="a mere common beginning is another path"),
        pytest.param("--dir=/models", "--dir=/models", id="only at the beginning"),
        pytest.param("file:///models", "file:///models", id="not inside an address"),
        pytest.param("/other", "/other", id="another path"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_a_mount_path_at_the_beginning_of_a_value_or_argument_becomes_the_local_directory(text: str, expected: str) -> None:
    planned = process(
        {"env": env(PLACE=text), "args": [text], "volumeMounts": mounts(models="/models", scratch="/models/scratch")},
        volumes=[CLAIM, SCRATCH],
    )
    assert planned.env["PLACE"] == expected
    assert planned.argv == ("serve", expected)


def test_a_value_is_rewritten_once_even_where_the_state_lies_below_the_mount_path() -> None:
    planned = process(
        {"env": env(PLACE="/data/cache"), "args": ["$(PLACE)", "--at=$(PLACE)"], "volumeMounts": mounts(scratch="/data")},
        volumes=[SCRATCH],
        state=Path("/data/state"),
    )
    place = "/data/state/pods/hello-1/volumes/scratch/cache"
    assert planned.env["PLACE"] == place
    assert planned.argv == ("serve", place, f"--at={place}")


def test_the_working_directory_is_rewritten_too() -> None:
    planned = process({"workingDir": "/models/here", "volumeMounts": mounts(models="/models")}, volumes=[CLAIM])
    assert planned.cwd == STATE / "volumes/default/models/here"


def test_paths_are_absolute_wherever_the_state_directory_was_named_from() -> None:
    planned = process({"env": env(PLACE="/models"), "volumeMounts": mounts(models="/models")}, volumes=[CLAIM], state=Path(".relight"))
    assert planned.env["PLACE"] == str(Path.cwd() / ".relight/volumes/default/models")


def test_an_empty_dir_is_the_pods_own_and_a_claim_is_shared_by_all_pods() -> None:
    container = {"volumeMounts": mounts(models="/models", scratch="/scratch")}
    first = process(container, volumes=[CLAIM, SCRATCH], pod="hello-1")
    second = process(container, volumes=[CLAIM, SCRATCH], pod="hello-2")
    assert first.directories == (STATE / "volumes/default/models", STATE / "pods/hello-1/volumes/scratch")
    assert second.directories == (STATE / "volumes/default/models", STATE / "pods/hello-2/volumes/scratch")


def test_a_directory_of_the_node_is_shared_by_all_pods_of_all_namespaces() -> None:
    node = {"name": "models", "hostPath": {"path": "/var/cache/relight", "type": "DirectoryOrCreate"}}
    planned = process({"volumeMounts": mounts(models="/models")}, volumes=[node])
    assert planned.directories == (STATE / "host/var/cache/relight",)


def test_containers_of_one_pod_share_its_empty_dir() -> None:
    here, there = plan({"volumeMounts": mounts(scratch="/a")}, {"volumeMounts": mounts(scratch="/b")}, volumes=[SCRATCH]).processes
    assert here.directories == there.directories


def test_a_sub_path_is_a_folder_of_the_volume() -> None:
    planned = process(
        {"env": env(PLACE="/models/x"), "volumeMounts": [{"name": "models", "mountPath": "/models", "subPath": "small"}]}, volumes=[CLAIM]
    )
    assert planned.env["PLACE"] == "/state/volumes/default/models/small/x"


def test_a_log_outlives_its_pod() -> None:
    assert process().log == STATE / "logs/default/hello-1/function.log"


def test_the_user_container_alone_is_told_the_port_to_open() -> None:
    planned = plan({}, {})
    function, sidecar = planned.processes
    assert (function.is_main, sidecar.is_main) == (True, False)
    assert function.env["PORT"] == str(planned.port) == str(FIRST_PORT)
    assert "PORT" not in sidecar.env


def test_a_sidecars_port_is_the_pods_own_and_its_probe_moves_along() -> None:
    probe = {"livenessProbe": {"httpGet": {"path": "/healthz", "port": 8090}}}
    function, sidecar = plan({"env": env(WEIGHTS_PORT="8090")}, {"env": env(WEIGHTS_PORT="8090"), **probe}).processes
    assert sidecar.env["WEIGHTS_PORT"] == function.env["WEIGHTS_PORT"] == str(FIRST_PORT + 1)
    assert sidecar.liveness
    assert sidecar.liveness.port == FIRST_PORT + 1


def test_a_sidecars_port_is_the_pods_own_without_a_probe_too() -> None:
    assert plan({}, {"env": env(WEIGHTS_PORT="8090")}).processes[1].env["WEIGHTS_PORT"] == str(FIRST_PORT + 1)


def test_the_port_of_somebody_else_is_left_alone() -> None:
    assert process({"env": env(DB_PORT="5432", DB_PORTS="8080", RETRIES="8080")}).env.items() >= {
        ("DB_PORT", "5432"),
        ("DB_PORTS", "8080"),
        ("RETRIES", "8080"),
    }


def test_a_probe_of_the_declared_port_goes_where_the_user_container_listens() -> None:
    planned = plan({"livenessProbe": {"tcpSocket": {"port": 8080}}, "readinessProbe": {"httpGet": {"path": "/readyz"}}})
    function = planned.processes[0]
    assert function.liveness
    assert function.readiness
    assert function.liveness.port == function.readiness.port == planned.port


def test_a_probe_of_a_port_that_no_variable_names_stays_where_it_is() -> None:
    # The program has that port fixed: nothing could tell it another.
    _, sidecar = plan({}, {"livenessProbe": {"tcpSocket": {"port": 6379}}}).processes
    assert sidecar.liveness
    assert sidecar.liveness.port == 6379


def test_a_variable_of_any_name_can_tell_a_probed_port() -> None:
    _, sidecar = plan({}, {"env": env(REDIS_PORT="6379"), "livenessProbe": {"tcpSocket": {"port": 6379}}}).processes
    assert sidecar.liveness
    assert sidecar.env["REDIS_PORT"] == str(sidecar.liveness.port) == str(FIRST_PORT + 1)


def test_without_a_readiness_probe_the_user_container_is_ready_when_its_port_is_open() -> None:
    function, sidecar = plan({}, {}).processes
    assert function.readiness == Probe(FIRST_PORT, path=None, headers={}, period_s=1, timeout_s=1, failures=3, delay_s=0)
    assert sidecar.readiness is None
    assert function.liveness is None


def test_a_probe_is_taken_as_it_is_written() -> None:
    written = {
        "httpGet": {"path": "/readyz", "httpHeaders": [{"name": "X-Probe", "value": "yes"}]},
        "periodSeconds": 7,
        "timeoutSeconds": 2,
        "failureThreshold": 5,
        "initialDelaySeconds": 3,
    }
    probe = process({"readinessProbe": written}).readiness
    assert probe == Probe(FIRST_PORT, "/readyz", {"X-Probe": "yes"}, period_s=7, timeout_s=2, failures=5, delay_s=3)


def test_a_probe_of_the_ports_name_asks_the_port() -> None:
    container = {"ports": [{"containerPort": 8080, "name": "http1"}], "readinessProbe": {"tcpSocket": {"port": "http1"}}}
    probe = process(container).readiness
    assert probe
    assert probe.port == FIRST_PORT


def test_a_command_that_is_a_probe_finds_what_the_container_finds() -> None:
    container = {"startupProbe": {"exec": {"command": ["test", "-e", "/data/ready"]}}, "volumeMounts": mounts(data="/data")}
    volumes = [{"name": "data", "emptyDir": {}}]
    probe = process(container, volumes=volumes).startup
    assert probe
    assert (probe.command, probe.period_s) == (("test", "-e", "/state/pods/hello-1/volumes/data/ready"), 10)


def test_limits_are_taken_in_cores_bytes_and_devices() -> None:
    limits = {"cpu": "1500m", "memory": "1Gi", "nvidia.com/gpu": 2}
    planned = plan({"resources": {"limits": limits}}, {"resources": {"limits": {"nvidia.com/gpu": "1"}}})
    assert planned.processes[0].limits == Limits(1.5, 1 << 30, 2)
    assert planned.gpus == 3
    assert process({"resources": {"requests": {"cpu": 1}}}).limits == Limits()


@pytest.mark.parametrize(
    ("cpu", "variables", "threads"),
    [
        pytest.param("1", {"FUNCTION_AGENT": "a:A"}, "1", id="one core, one thread"),
        pytest.param("500m", {"FUNCTION_AGENT": "a:A"}, "1", id="at least one"),
        pytest.param("3", {"FUNCTION_AGENT": "a:A"}, "3", id="as many as cores"),
        pytest.param("64", {"FUNCTION_AGENT": "a:A"}, "7", id="but one core of the machine is for everybody else"),
        pytest.param("1", {"FUNCTION_AGENT": "a:A", "FUNCTION_TORCH_THREADS": "4"}, "4", id="what is declared wins"),
        pytest.param("1", {}, None, id="another program"),
    ],
)
def test_a_functions_torch_has_as_many_threads_as_its_cpu_limit(
    cpu: str, variables: dict[str, str], threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    planned = process({"env": env(**variables), "resources": {"limits": {"cpu": cpu}}})
    assert planned.env.get("FUNCTION_TORCH_THREADS") == threads
    assert "OMP_NUM_THREADS" not in planned.env  # so that it may come from the fork server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("$(NAME)", "world", id="a name alone"),
        pytest.param("hello $(NAME)!", "hello world!", id="inside a text"),
        pytest.param("$(NAME)$(NAME)", "worldworld", id="twice"),
        pytest.param("$(NOBODY)", "$(NOBODY)", id="a name that is not set"),
        pytest.param("$(LATER)", "$(LATER)", id="a name that is set further down"),
        pytest.param("$$(NAME)", "$(NAME)", id="escaped"),
        pytest.param("$$$(NAME)", "$world", id="escaped and a name"),
        pytest.param("5$$", "5$", id="a doubled sign alone"),
        pytest.param("$NAME ${NAME}", "$NAME ${NAME}", id="what a shell would expand"),
        pytest.param("$(NAME", "$(NAME", id="left open"),
    ],
)
def test_a_variable_is_expanded_as_in_kubernetes(text: str, expected: str) -> None:
    assert process({"env": env(NAME="world", TEXT=text, LATER="x")}).env["TEXT"] == expected


def test_arguments_may_name_any_variable_of_their_container() -> None:
    planned = plan({"command": ["sh", "-c"], "args": ["serve --port $(PORT) --as $(K_SERVICE) $(NAME)"], "env": env(NAME="x")})
    assert planned.processes[0].argv == ("sh", "-c", f"serve --port {planned.port} --as hello x")


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        pytest.param({"envFrom": [{"configMapRef": {"name": "flags"}}]}, {"COLOUR": "blue", "SIZE": "small"}, id="a whole ConfigMap"),
        pytest.param({"envFrom": [{"prefix": "MY_", "secretRef": {"name": "keys"}}]}, {"MY_TOKEN": "geheim"}, id="a Secret with a prefix"),
        pytest.param(
            {"env": [{"name": "PAINT", "valueFrom": {"configMapKeyRef": {"name": "flags", "key": "COLOUR"}}}]},
            {"PAINT": "blue"},
            id="one key",
        ),
        pytest.param(
            {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "TOKEN"}}}]},
            {"KEY": "geheim"},
            id="one key of a Secret",
        ),
        pytest.param(
            {"envFrom": [{"configMapRef": {"name": "flags"}}], "env": env(COLOUR="red")},
            {"COLOUR": "red", "SIZE": "small"},
            id="env wins over envFrom",
        ),
        pytest.param(
            {"envFrom": [{"configMapRef": {"name": "flags"}}], "env": env(SAID="$(COLOUR)")},
            {"SAID": "blue"},
            id="env may name what came with envFrom",
        ),
    ],
)
def test_variables_come_from_config_maps_and_secrets(container: dict[str, Any], expected: dict[str, str]) -> None:
    assert process(container, objects=[FLAGS, KEYS]).env.items() >= expected.items()


@pytest.mark.parametrize(
    "container",
    [
        pytest.param({"envFrom": [{"secretRef": {"name": "lost", "optional": True}}]}, id="a whole Secret"),
        pytest.param(
            {"env": [{"name": "LOST", "valueFrom": {"configMapKeyRef": {"name": "flags", "key": "LOST", "optional": True}}}]}, id="one key"
        ),
    ],
)
def test_what_is_optional_may_be_missing(container: dict[str, Any]) -> None:
    assert "LOST" not in process(container, objects=[FLAGS]).env


@pytest.mark.parametrize(
    ("container", "said"),
    [
        pytest.param(
            {"envFrom": [{"secretRef": {"name": "lost"}}]},
            "envFrom[0].secretRef: found Secret 'lost', which is in no manifest here; in namespace default there are none",
            id="a whole Secret",
        ),
        pytest.param(
            {"envFrom": [{"configMapRef": {"name": "lost"}}]},
            "envFrom[0].configMapRef: found ConfigMap 'lost', which is in no manifest here; in namespace default there are flags",
            id="a whole ConfigMap",
        ),
        pytest.param(
            {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "lost", "key": "x"}}}]},
            "env[0].valueFrom.secretKeyRef: found Secret 'lost', which is in no manifest here; in namespace default there are none",
            id="a key of no Secret",
        ),
        pytest.param(
            {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "flags", "key": "x"}}}]},
            "env[0].valueFrom.configMapKeyRef: ConfigMap flags has no key 'x'; it has COLOUR, SIZE",
            id="no such key",
        ),
    ],
)
def test_what_is_missing_and_not_optional_is_named(container: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        plan(container, objects=[FLAGS])
    assert str(caught.value) == f"hello.yaml: document 1 (Service hello): spec.template.spec.containers[0].{said}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OBJECT_STORE, STORE),
        (f"{OBJECT_STORE}/bucket", f"{STORE}/bucket"),
        (f"{OBJECT_STORE}.example", f"{OBJECT_STORE}.example"),
    ],
    ids=["the store itself", "something in it", "somebody else's"],
)
def test_the_embedded_stores_name_becomes_its_address(text: str, expected: str) -> None:
    planned = process({"env": env(AWS_ENDPOINT_URL=text), "args": [text]})
    assert planned.env["AWS_ENDPOINT_URL"] == expected
    assert planned.argv[1] == expected


def test_knatives_own_names_are_told() -> None:
    for planned in plan({}, {}).processes:
        assert planned.env.items() >= {("K_SERVICE", "hello"), ("K_CONFIGURATION", "hello"), ("K_REVISION", "hello-00001")}


SINK = "http://127.0.0.1:9998"
QUEUE_URL = f"{QUEUES}/000000000000/work"


@pytest.mark.parametrize(
    "declared", [{}, {"env": [{"name": "WEIGHTS_PORT", "value": "8090"}]}, {"env": [{"name": "WEIGHTS_PORT", "value": "9000"}]}]
)
def test_a_sidecar_has_a_port_of_its_own_in_each_pod_and_its_function_knows_it(declared: dict[str, Any]) -> None:
    ours = {"command": ["python", "-m", "weights_cache", "serve"], **declared}
    function, sidecar, other = plan({"command": ["python", "-m", "function"]}, ours, {"command": ["proxy"]}).processes
    assert sidecar.env["WEIGHTS_PORT"] == function.env["WEIGHTS_PORT"] == str(FIRST_PORT + 1)
    assert "WEIGHTS_PORT" not in other.env
    assert "WEIGHTS_PORT" not in plan({"command": ["python", "-m", "function"]}).processes[0].env


def plan_queue_source(container: Mapping[str, Any], *, objects: Sequence[Mapping[str, Any]] = (), **spec: Any) -> PodPlan:
    """The pod of a source whose first container has these fields; `spec` is the source's."""
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "hello"},
        "spec": {"template": {"spec": {"containers": [{"command": ["serve"]}]}}},
    }
    pod = {"containers": [{"name": "poll", "command": ["poll", "$(K_SINK)"], **container}], "terminationGracePeriodSeconds": 7}
    source = {
        "apiVersion": "sources.knative.dev/v1",
        "kind": "ContainerSource",
        "metadata": {"name": "events"},
        "spec": {"sink": {"uri": SINK}, "template": {"spec": pod}, **spec},
    }
    (found,) = read_manifests([("hello.yaml", yaml.safe_dump_all([service, source, *objects]))]).sources
    addresses = {OBJECT_STORE: STORE, QUEUES: STORE}
    return plan_source(
        found, pod="events-1", sink=SINK, places=Places(STATE), free_port=itertools.count(FIRST_PORT).__next__, addresses=addresses
    )


def test_a_source_is_told_its_sink_as_a_sink_binding_tells_it() -> None:
    found = plan_queue_source({}, ceOverrides={"extensions": {"tenant": "a"}})
    (poll,) = found.processes
    assert poll.argv == ("poll", SINK)
    assert poll.env["K_SINK"] == SINK
    assert poll.env["K_CE_OVERRIDES"] == '{"extensions": {"tenant": "a"}}'
    assert not {"K_SERVICE", "K_REVISION", "PORT", "QUEUE_SOURCE_PORT"} & poll.env.keys()
    assert (poll.readiness, poll.log) == (None, Path("/state/logs/default/events-1/poll.log"))
    assert (found.port, found.grace_s) == (0, 7)
    assert "K_CE_OVERRIDES" not in plan_queue_source({}).processes[0].env


def test_a_queue_source_has_the_embedded_queue_and_a_port_of_its_own() -> None:
    probe = {"httpGet": {"path": "/readyz", "port": 9099}}
    found = plan_queue_source({"env": env(QUEUE_SOURCE_URL=QUEUE_URL, QUEUE_SOURCE_PORT="9099"), "readinessProbe": probe})
    (poll,) = found.processes
    assert poll.env["QUEUE_SOURCE_URL"] == f"{STORE}/000000000000/work"
    assert poll.env["QUEUE_SOURCE_PORT"] == str(found.port) == str(FIRST_PORT)
    assert poll.readiness
    assert poll.readiness.port == FIRST_PORT


def test_the_port_of_a_queue_source_may_have_a_name_and_its_settings_come_from_elsewhere() -> None:
    data = {"QUEUE_SOURCE_URL": QUEUE_URL, "QUEUE_SOURCE_PORT": "9099"}
    flags = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "queue"}, "data": data}
    found = plan_queue_source(
        {
            "envFrom": [{"configMapRef": {"name": "queue"}}],
            "ports": [{"name": "metrics", "containerPort": 9099}],
            "livenessProbe": {"httpGet": {"port": "metrics"}},
        },
        objects=[flags],
    )
    (poll,) = found.processes
    assert poll.env["QUEUE_SOURCE_PORT"] == str(FIRST_PORT)
    assert poll.liveness
    assert poll.liveness.port == FIRST_PORT
    (poll,) = plan_queue_source({"env": env(QUEUE_SOURCE_URL=QUEUE_URL)}).processes
    assert poll.env["QUEUE_SOURCE_PORT"] == str(FIRST_PORT)


FUNCTION = {"command": ["python", "-m", "function"]}


def test_a_function_looks_for_its_agent_beside_the_manifest_and_where_it_was_started_unless_it_is_told_otherwise() -> None:
    here = str(Path.cwd())
    assert process(FUNCTION).env["FUNCTION_AGENT_PATH"] == here  # the manifest lies here, too
    assert process(FUNCTION | {"workingDir": "/work"}).env["FUNCTION_AGENT_PATH"] == f"/work:{here}"
    assert process(FUNCTION | {"env": env(FUNCTION_AGENT_PATH="/app")}).env["FUNCTION_AGENT_PATH"] == "/app"
    assert "FUNCTION_AGENT_PATH" not in process().env


@pytest.mark.parametrize(
    ("uri", "declared", "expected"),
    [
        pytest.param("s3://models/own", {}, STORE, id="seeded"),
        pytest.param("s3://models/own/small#0123", {}, STORE, id="below a seed"),
        pytest.param("s3://models/owner", {}, None, id="another's"),
        pytest.param("s3://models/own", {"AWS_ENDPOINT_URL": "http://elsewhere"}, "http://elsewhere", id="a store that is named"),
    ],
)
def test_a_sidecar_that_is_told_of_no_store_finds_seeded_weights_in_the_embedded_one(
    uri: str, declared: Mapping[str, str], expected: str | None
) -> None:
    seeds = Seeds([Seed(Path("weights"), "s3://models/own/")])
    sidecar = {"command": ["python", "-m", "weights_cache", "serve"], "env": env(WEIGHTS_URI=uri, **declared)}
    function, cache = plan(FUNCTION | {"env": env(WEIGHTS_URI=uri)}, sidecar, seeds=seeds).processes
    assert cache.env.get("AWS_ENDPOINT_URL") == expected
    assert ("AWS_SECRET_ACCESS_KEY" in cache.env) == (expected == STORE)
    assert "AWS_ENDPOINT_URL" not in function.env


def test_weights_that_a_cache_has_others_of_are_pinned_for_both_containers() -> None:
    seed = Seed(Path("weights"), "s3://models/own")
    seeds = Seeds([seed])
    seeds.pin(seed, "", "s3://models/own#0123")
    sidecar = {"command": ["python", "-m", "weights_cache", "serve"], "env": env(WEIGHTS_URI="s3://models/own")}
    planned = plan(FUNCTION | {"env": env(WEIGHTS_URI="s3://models/own")}, sidecar, seeds=seeds)
    assert [process.env["WEIGHTS_URI"] for process in planned.processes] == ["s3://models/own#0123"] * 2


@pytest.mark.parametrize(
    ("file", "container", "is_hidden"),
    [
        ("function.py", FUNCTION, True),
        ("weights_cache/__init__.py", FUNCTION, True),
        ("knative.py", {"command": ["python", "-m", "weights_cache", "serve"]}, True),
        ("functions.py", FUNCTION, False),
        ("function/notes.txt", FUNCTION, False),
        ("function.py", {"command": ["python", "server.py"]}, False),
        ("function.py", FUNCTION | {"env": env(PYTHONSAFEPATH="1")}, False),
    ],
)
def test_a_file_that_hides_one_of_our_packages_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, container: Mapping[str, Any], is_hidden: bool
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    monkeypatch.chdir(tmp_path)
    if is_hidden:
        hides = path.parent if path.name == "__init__.py" else path
        with pytest.raises(PlatformError, match=f"^{hides} hides Relight's own package of that name from function; give it another name"):
            plan(container)
    else:
        plan(container)
