"""The objects that may stand in a manifest, field by field.

Fields that a cluster needs and one machine does not (image, resources, security contexts) are accepted and left alone; a field that
no Knative Service has is an error, because in a manifest a misspelt name is a setting that silently does nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

# As Kubernetes has them; here they become parts of host names and of paths too.
Label = Annotated[str, Field(pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
# A tag and a revision's name are DNS 1035 labels: they begin with a letter.
Name = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Subdomain = Annotated[str, Field(pattern="^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, frozen=True)


class Metadata(_Strict):
    """`metadata`, of an object or a template."""

    name: Subdomain = ""
    namespace: Label = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ServiceMetadata(Metadata):
    """`metadata` of a Service, whose name is part of a host name."""

    name: Label


class KeyRef(_Strict):
    """One key of a ConfigMap or Secret."""

    name: str
    key: str
    optional: bool = False


class EnvSource(_Strict):
    """`valueFrom`."""

    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None


class EnvVar(_Strict):
    """One item of `env`."""

    name: str = Field(pattern="^[^=]+$")
    value: str = ""
    value_from: EnvSource | None = None


class SourceRef(_Strict):
    """A whole ConfigMap or Secret."""

    name: str
    optional: bool = False


class EnvFrom(_Strict):
    """One item of `envFrom`."""

    prefix: str = ""
    config_map_ref: SourceRef | None = None
    secret_ref: SourceRef | None = None


class ContainerPort(_Strict):
    """The port of the user container."""

    container_port: int = Field(ge=1, le=65535)
    name: Literal["", "http1", "h2c"] = ""
    protocol: Literal["TCP"] = "TCP"


class HttpHeader(_Strict):
    """A header that a probe sends."""

    name: str
    value: str


class HttpGet(_Strict):
    """An HTTP probe; without a port it asks the container's own."""

    path: str = "/"
    port: int | None = Field(None, ge=0, le=65535)
    host: str | None = None
    scheme: Literal["HTTP"] = "HTTP"
    http_headers: list[HttpHeader] = []


class TcpSocket(_Strict):
    """A TCP probe."""

    port: int | None = Field(None, ge=0, le=65535)
    host: str | None = None


class ProbeSpec(_Strict):
    """A liveness, readiness or startup probe; seconds and counts as in Kubernetes (a period of 0 is Knative's "as often as is useful")."""

    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    initial_delay_seconds: int = Field(0, ge=0)
    period_seconds: int = Field(0, ge=0)
    timeout_seconds: int = Field(1, ge=1)
    success_threshold: int = Field(1, ge=1)
    failure_threshold: int = Field(3, ge=1)


class VolumeMount(_Strict):
    """Where a container sees a volume."""

    name: str
    mount_path: str = Field(pattern="^/")
    read_only: bool = False
    sub_path: str = ""


class Container(_Strict):
    """A container, of which one machine needs the command, its environment, its ports, probes and mounts."""

    name: Label = "user-container"
    image: str = ""
    image_pull_policy: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    env_from: list[EnvFrom] = []
    ports: list[ContainerPort] = Field([], max_length=1)
    liveness_probe: ProbeSpec | None = None
    readiness_probe: ProbeSpec | None = None
    startup_probe: ProbeSpec | None = None
    resources: dict[str, Any] = {}
    security_context: dict[str, Any] = {}
    volume_mounts: list[VolumeMount] = []
    working_dir: str | None = None


class ClaimSource(_Strict):
    """A persistent volume claim."""

    claim_name: Subdomain
    read_only: bool = False


class Volume(_Strict):
    """A volume: lives as long as the pod (emptyDir) or outlives it (persistentVolumeClaim)."""

    name: Label
    empty_dir: dict[str, Any] | None = None
    persistent_volume_claim: ClaimSource | None = None


class PodSpec(_Strict):
    """`spec.template.spec`."""

    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []
    container_concurrency: int = Field(0, ge=0, le=1000)
    timeout_seconds: int = Field(300, ge=1, le=600)
    response_start_timeout_seconds: int | None = Field(None, ge=0, le=600)
    idle_timeout_seconds: int | None = Field(None, ge=0, le=600)
    enable_service_links: bool | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    image_pull_secrets: list[dict[str, str]] = []
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    runtime_class_name: str | None = None
    priority_class_name: str | None = None


class Template(_Strict):
    """`spec.template`."""

    metadata: Metadata = Metadata()
    spec: PodSpec


class TrafficTarget(_Strict):
    """One item of `spec.traffic`: a share of the requests, or a host of its own (tag), for one revision or for the latest that is ready."""

    revision_name: Name | None = None
    latest_revision: bool | None = None
    percent: int | None = Field(None, ge=0, le=100)
    tag: Name | None = None


class ServiceSpec(_Strict):
    """`spec` of a Service."""

    template: Template
    traffic: list[TrafficTarget] = []


class ServiceObject(_Strict):
    """A Knative Service."""

    api_version: Literal["serving.knative.dev/v1"]
    kind: Literal["Service"]
    metadata: ServiceMetadata
    spec: ServiceSpec


class ConfigMap(_Strict):
    """A ConfigMap."""

    api_version: Literal["v1"]
    kind: str
    metadata: Metadata
    data: dict[str, str] = {}
    immutable: bool = False


class Secret(ConfigMap):
    """A Secret; its `data` is base64."""

    string_data: dict[str, str] = {}
    type: str = ""
