"""What a Service or a source must be beyond its form: Knative's own rules, so that what runs here is accepted there, and one machine's.

Sources: knative/serving pkg/apis/serving/k8s_validation.go and v1/revision_validation.go (1.23); knative/eventing
pkg/apis/sources/v1/container_validation.go and knative/pkg apis/duck/v1/destination.go.
"""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from knative.local.schema import (
    Container,
    ContainerSourceObject,
    PodSpec,
    ProbeSpec,
    ServiceObject,
    Sink,
    SourceContainer,
    SourcePodSpec,
)
from weights_cache.environment import told

Broken = tuple[str, str]  # the path in the document, and what is wrong there
AnyContainer = Container | SourceContainer

RESERVED_PORTS = (8008, 8012, 8013, 8022, 8112, 9090, 9091)
_RESERVED_NAMES = ("queue-proxy",)
_RESERVED_PATHS = ("/", "/dev", "/dev/log")
_RESERVED_ENV = ("K_SERVICE", "K_CONFIGURATION", "K_REVISION")
_BOUND_ENV = ("K_SINK", "K_CE_OVERRIDES")  # what a SinkBinding sets
_TEMPLATE = "spec.template.spec"
_NO_COMMAND = "found none; here images are not run, so each container must name its command"


def broken_rules(item: ServiceObject) -> Iterator[Broken]:
    """Each rule that the Service breaks, with where it does."""
    misplaced = [name for name in item.metadata.annotations if name.startswith("autoscaling.knative.dev/")]
    if misplaced:
        yield (
            f"metadata.annotations.{misplaced[0]}",
            "has no effect here; scale annotations belong under spec.template.metadata.annotations",
        )
    spec = item.spec.template.spec
    yield from _timeouts(spec)
    yield from _containers(spec)
    yield from _volumes(spec)


def broken_source_rules(item: ContainerSourceObject) -> Iterator[Broken]:
    """Each rule that the source breaks, with where it does; whether its sink is there is not asked."""
    yield from _sink(item.spec.sink)
    spec = item.spec.template.spec
    names = Counter(container.name for container in spec.containers)
    for index, container in enumerate(spec.containers):
        here = f"{_TEMPLATE}.containers[{index}]"
        if names[container.name] > 1:
            yield f"{here}.name", f"found {container.name!r} twice; names must differ"
        if not container.command:
            yield f"{here}.command", _NO_COMMAND
        yield from _environment(container, here, _BOUND_ENV)
        yield from _mounts(container, here, spec)
        for kind in ("liveness", "readiness", "startup"):
            if probe := getattr(container, f"{kind}_probe"):
                yield from _probe(probe, f"{here}.{kind}Probe", kind, container, is_main=False)
    yield from _volumes(spec)


def _sink(sink: Sink) -> Iterator[Broken]:
    uri = urlsplit(sink.uri) if sink.uri is not None else None
    if sink.ref is None and uri is None:
        yield "spec.sink", "found neither ref nor uri; must say where the events go"
    elif sink.ref is None:
        if uri is None or uri.scheme not in ("http", "https") or not uri.netloc:
            yield "spec.sink.uri", f"found {told(str(sink.uri))}; must be an http address, or a path with a ref"
    else:
        kind = f"{sink.ref.api_version} {sink.ref.kind}"
        if kind != "serving.knative.dev/v1 Service":
            yield "spec.sink.ref", f"found a {kind}; here a sink is a serving.knative.dev/v1 Service, or an address (uri)"
        if uri is not None and (uri.scheme or uri.netloc or not uri.path.startswith("/")):
            yield "spec.sink.uri", f"found {told(str(sink.uri))}; with a ref it must be a path that begins with /"


def _timeouts(spec: PodSpec) -> Iterator[Broken]:
    limits = {"responseStartTimeoutSeconds": spec.response_start_timeout_seconds, "idleTimeoutSeconds": spec.idle_timeout_seconds}
    for name, seconds in limits.items():
        if seconds and seconds > spec.timeout_seconds:
            yield f"{_TEMPLATE}.{name}", f"found {seconds}; at most timeoutSeconds is allowed, here {spec.timeout_seconds}"


def _containers(spec: PodSpec) -> Iterator[Broken]:
    at = f"{_TEMPLATE}.containers"
    with_ports = [container.name for container in spec.containers if container.ports]
    if len(spec.containers) > 1 and len(with_ports) != 1:
        yield at, f"found ports in {with_ports or 'none'}; exactly one container must have them, the one that is called"
    names = Counter(container.name for container in spec.containers)
    for index, container in enumerate(spec.containers):
        here = f"{at}[{index}]"
        if names[container.name] > 1:
            yield f"{here}.name", f"found {container.name!r} twice; names must differ"
        if container.name in _RESERVED_NAMES:
            yield f"{here}.name", f"found {container.name!r}, which Knative keeps for itself"
        if not container.command:
            yield f"{here}.command", _NO_COMMAND
        is_main = bool(container.ports) or len(spec.containers) == 1
        for port in container.ports:
            if port.container_port in RESERVED_PORTS:
                yield f"{here}.ports[0].containerPort", f"found {port.container_port}; Knative keeps {_either(RESERVED_PORTS)} for itself"
        yield from _environment(container, here, (*_RESERVED_ENV, "PORT") if is_main else _RESERVED_ENV)
        yield from _mounts(container, here, spec)
        for kind in ("liveness", "readiness", "startup"):
            if probe := getattr(container, f"{kind}_probe"):
                yield from _probe(probe, f"{here}.{kind}Probe", kind, container, is_main=is_main)


def _environment(container: AnyContainer, at: str, reserved: tuple[str, ...]) -> Iterator[Broken]:
    names: Counter[str] = Counter()
    for index, variable in enumerate(container.env):
        names[variable.name] += 1
        if variable.name in reserved:
            yield f"{at}.env[{index}].name", f"found {variable.name!r}, which Knative sets itself"
        if names[variable.name] == 2:
            yield f"{at}.env[{index}].name", f"found {variable.name!r} twice; the last one would win without a word"


def _mounts(container: AnyContainer, at: str, spec: PodSpec | SourcePodSpec) -> Iterator[Broken]:
    volumes = {volume.name: volume for volume in spec.volumes}
    paths: set[str] = set()
    for index, mount in enumerate(container.volume_mounts):
        here = f"{at}.volumeMounts[{index}]"
        if mount.name not in volumes:
            yield f"{here}.name", f"found {mount.name!r}; volumes are {sorted(volumes)}"
            continue
        path = "/" + mount.mount_path.strip("/")
        if path in _RESERVED_PATHS:
            yield f"{here}.mountPath", f"found {mount.mount_path!r}; Knative keeps {_either(_RESERVED_PATHS)} for itself"
        if path in paths:
            yield f"{here}.mountPath", f"found {mount.mount_path!r} twice; paths must differ"
        paths.add(path)
        if ".." in mount.sub_path.split("/") or mount.sub_path.startswith("/"):
            yield f"{here}.subPath", f"found {mount.sub_path!r}; must be a path inside the volume"
        claim = volumes[mount.name].persistent_volume_claim
        if claim and claim.read_only and not mount.read_only:
            yield f"{here}.readOnly", f"found false; volume {mount.name!r} is readOnly, so its mounts must be too"


def _volumes(spec: PodSpec | SourcePodSpec) -> Iterator[Broken]:
    names = Counter(volume.name for volume in spec.volumes)
    mounted = {mount.name for container in spec.containers for mount in container.volume_mounts}
    for index, volume in enumerate(spec.volumes):
        here = f"{_TEMPLATE}.volumes[{index}]"
        sources = {"emptyDir": volume.empty_dir, "persistentVolumeClaim": volume.persistent_volume_claim, "hostPath": volume.host_path}
        found = [name for name, source in sources.items() if source is not None]
        if len(found) != 1:
            yield here, f"found {' and '.join(found) or 'none'}; allowed are emptyDir, persistentVolumeClaim and hostPath, one of them"
        if names[volume.name] > 1:
            yield f"{here}.name", f"found {volume.name!r} twice; names must differ"
        if volume.name not in mounted:
            yield f"{here}.name", f"found {volume.name!r}, which no container mounts; Knative refuses that"


def _probe(probe: ProbeSpec, at: str, kind: str, container: AnyContainer, *, is_main: bool) -> Iterator[Broken]:
    targets = {"httpGet": probe.http_get, "tcpSocket": probe.tcp_socket, "exec": probe.exec}
    found = [name for name, target in targets.items() if target]
    if len(found) > 1 or (not found and (kind != "readiness" or not is_main)):
        yield at, f"found {' and '.join(found) or 'nothing to ask'}; must have one of {', '.join(targets)}"
    if kind != "readiness" and probe.success_threshold != 1:
        yield f"{at}.successThreshold", f"found {probe.success_threshold}; must be 1 for a {kind} probe"
    target = probe.http_get or probe.tcp_socket
    if target is None:
        return
    here = f"{at}.{found[0]}"
    names = [port.name for port in container.ports if port.name]
    if not is_main and not isinstance(target.port, int) and not names:
        yield f"{here}.port", f"found {target.port or 'none'}; must be a number, as this container has no ports of its own"
    elif not is_main and not target.port:
        yield f"{here}.port", f"found none; must be a number or a port's name, {' or '.join(names)}"
    elif isinstance(target.port, str) and target.port not in names:
        yield (
            f"{here}.port",
            f"found {target.port!r}; must be a number" + (f" or the container's port, {' or '.join(names)}" if names else ""),
        )
    if target.host not in (None, "", "127.0.0.1", "localhost"):
        yield f"{here}.host", f"found {target.host!r}; a probe asks the container itself, so leave it out"
    if probe.http_get and not probe.http_get.path.startswith("/"):
        yield f"{here}.path", f"found {probe.http_get.path!r}; must begin with /"


def _either(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
