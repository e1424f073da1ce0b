"""What one revision's autoscaling is to be: its annotations, on top of the cluster's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knative.autoscaler.config import (
    HPA,
    KPA,
    PANIC_WINDOW_PERCENTAGE_MAX,
    PANIC_WINDOW_PERCENTAGE_MIN,
    SETTINGS,
    TARGET_MIN,
    WINDOW_MAX_NS,
    WINDOW_MIN_NS,
    AutoscalerConfig,
)
from knative.autoscaler.entries import NS_PER_S, Entries, unknown_name
from knative.autoscaler.errors import SpecError

CONCURRENCY = "concurrency"
RPS = "rps"
LINEAR = "linear"
WEIGHTED_EXPONENTIAL = "weighted-exponential"

ANNOTATION_PREFIX = "autoscaling.knative.dev/"
PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"

CONTAINER_CONCURRENCY_MAX = 1000  # Knative's default for container-concurrency-max-limit
PROGRESS_DEADLINE_NS = 600 * NS_PER_S  # Knative's default in config-deployment

# Of a target in requests per second; no cluster setting changes it, only the annotation does.
_RPS_TARGET_FRACTION = 0.7

# Every spelling that Knative reads -> the canonical name. Where a revision has both, the canonical one counts.
_SPELLINGS = {
    name: name
    for name in (
        "class",
        "metric",
        "target",
        "target-utilization-percentage",
        "window",
        "panic-window-percentage",
        "panic-threshold-percentage",
        "min-scale",
        "max-scale",
        "initial-scale",
        "activation-scale",
        "scale-down-delay",
        "scale-to-zero-pod-retention-period",
        "target-burst-capacity",
        "metric-aggregation-algorithm",
    )
} | {
    "targetUtilizationPercentage": "target-utilization-percentage",
    "panicWindowPercentage": "panic-window-percentage",
    "panicThresholdPercentage": "panic-threshold-percentage",
    "minScale": "min-scale",
    "maxScale": "max-scale",
    "initialScale": "initial-scale",
    "scaleDownDelay": "scale-down-delay",
    "scaleToZeroPodRetentionPeriod": "scale-to-zero-pod-retention-period",
    "targetBurstCapacity": "target-burst-capacity",
    "metricAggregationAlgorithm": "metric-aggregation-algorithm",
}


@dataclass(frozen=True)
class ScaleSpec:
    """Everything a decision needs to know about a revision; the defaults are Knative's own.

    `parse` checks its input; the constructor does not.
    """

    autoscaler_class: str = KPA
    metric: str = CONCURRENCY  # what is measured: concurrency or rps (the class HPA has others)
    target: float = 70.0  # of the metric, per pod: what is aimed at
    total: float = 100.0  # of the metric, per pod: what a pod can take
    aggregation: str = LINEAR  # how a window is averaged
    stable_window_s: int = 60
    panic_window_s: int = 6
    panic_threshold: float = 2.0  # pods wanted per ready pod at which panic begins
    max_scale_up_rate: float = 1000.0  # most pods wanted per ready pod
    max_scale_down_rate: float = 2.0  # most ready pods per pod wanted
    scale_down_delay_s: float = 0.0  # for so long the largest count stays wanted
    activation_scale: int = 0  # least pods when any is wanted; 0: no such wish
    target_burst_capacity: float = 211.0  # requests at once to be ready for beyond the present load; -1 unlimited
    activator_capacity: float = 100.0  # requests at once per activator
    min_scale: int = 0
    max_scale: int = 0  # 0: unlimited
    initial_scale: int = 1  # pods a new revision starts with, and must once have had ready
    enable_scale_to_zero: bool = True
    scale_to_zero_grace_period_s: float = 30.0  # at most so long the last pod waits for the activator to take over
    scale_to_zero_pod_retention_period_s: float = 0.0  # at least so long the last pod outlives the wish for it
    progress_deadline_s: float = 600.0  # a revision that is not ready by then has failed
    reachable: bool = True  # False once no route leads to the revision: it may leave at once, whatever its minimum

    @classmethod
    def parse(cls, annotations: Mapping[str, str], container_concurrency: int = 0, config: Mapping[str, str] | None = None) -> ScaleSpec:
        """The spec of a revision with these annotations, checked as Knative's webhook checks them.

        annotations: of the revision's template; keys with the prefix `autoscaling.knative.dev/` or without any. Those with another
        prefix are left alone, but for `serving.knative.dev/progress-deadline`.
        container_concurrency: requests at once per pod, 0 for no limit.
        config: the data of the ConfigMap `config-autoscaler`.
        Raises SpecError for a value that Knative refuses, and for a name or an aggregation algorithm that it would silently ignore
        (pkg/apis/autoscaling/annotation_validation.go at knative/serving 98e5ef90aa).
        """
        cluster = AutoscalerConfig.parse(config or {})
        entries = _canonical(annotations)
        autoscaler_class = entries.text("class", cluster.pod_autoscaler_class, (KPA, HPA))
        metric = _metric(entries, autoscaler_class)
        target, total = _target(entries, cluster, metric, _checked_concurrency(container_concurrency))
        stable_window_ns = entries.duration_ns(
            "window", cluster.stable_window_ns, low=WINDOW_MIN_NS, high=WINDOW_MAX_NS, whole_seconds=True
        )
        panic_window_percentage = entries.number(
            "panic-window-percentage",
            cluster.panic_window_percentage,
            low=PANIC_WINDOW_PERCENTAGE_MIN,
            high=PANIC_WINDOW_PERCENTAGE_MAX,
        )
        panic_threshold_percentage = entries.number("panic-threshold-percentage", cluster.panic_threshold_percentage, low=110, high=1000)
        min_scale, max_scale, activation_scale = _scales(entries, cluster)
        scale_down_delay_ns = entries.duration_ns("scale-down-delay", cluster.scale_down_delay_ns, high=WINDOW_MAX_NS, whole_seconds=True)
        retention_ns = entries.duration_ns(
            "scale-to-zero-pod-retention-period", cluster.scale_to_zero_pod_retention_period_ns, high=WINDOW_MAX_NS
        )
        return cls(
            autoscaler_class=autoscaler_class,
            metric=metric,
            target=target,
            total=total,
            aggregation=_aggregation(entries, autoscaler_class),
            stable_window_s=stable_window_ns // NS_PER_S,
            panic_window_s=_panic_window_s(stable_window_ns, panic_window_percentage),
            panic_threshold=panic_threshold_percentage / 100.0,
            max_scale_up_rate=cluster.max_scale_up_rate,
            max_scale_down_rate=cluster.max_scale_down_rate,
            scale_down_delay_s=scale_down_delay_ns / NS_PER_S,
            activation_scale=activation_scale,
            target_burst_capacity=entries.burst_capacity("target-burst-capacity", cluster.target_burst_capacity),
            activator_capacity=cluster.activator_capacity,
            min_scale=min_scale,
            max_scale=max_scale,
            initial_scale=_initial_scale(entries, cluster),
            enable_scale_to_zero=cluster.enable_scale_to_zero,
            scale_to_zero_grace_period_s=cluster.scale_to_zero_grace_period_ns / NS_PER_S,
            scale_to_zero_pod_retention_period_s=retention_ns / NS_PER_S,
            progress_deadline_s=entries.duration_ns(PROGRESS_DEADLINE, PROGRESS_DEADLINE_NS, whole_seconds=True) / NS_PER_S,
        )


def _canonical(annotations: Mapping[str, str]) -> Entries:
    """The annotations that concern autoscaling, by canonical name."""
    found: dict[str, tuple[str, object]] = {}
    for written, value in annotations.items():
        name = written.removeprefix(ANNOTATION_PREFIX)
        if written == PROGRESS_DEADLINE:
            found[written] = (written, value)
        elif name in _SPELLINGS:
            canonical = _SPELLINGS[name]
            if canonical not in found or name == canonical:
                found[canonical] = (written, value)
        elif name in SETTINGS:
            raise SpecError(written, value, "is for the whole cluster: set it in config-autoscaler")
        elif "/" not in name:
            raise unknown_name(name, written, value, "annotation", _SPELLINGS)
    return Entries(found)


def _checked_concurrency(container_concurrency: int) -> int:
    if type(container_concurrency) is not int or not 0 <= container_concurrency <= CONTAINER_CONCURRENCY_MAX:
        raise SpecError("containerConcurrency", container_concurrency, f"must be a whole number from 0 to {CONTAINER_CONCURRENCY_MAX}")
    return container_concurrency


def _metric(entries: Entries, autoscaler_class: str) -> str:
    if autoscaler_class == KPA:
        return entries.text("metric", CONCURRENCY, (CONCURRENCY, RPS))
    # The HPA may scale on any custom metric; only naming none is a mistake.
    return entries.any_text("metric", "cpu")


def _target(entries: Entries, cluster: AutoscalerConfig, metric: str, container_concurrency: int) -> tuple[float, float]:
    """What a pod is meant to take and what it can take, of the metric."""
    if metric == RPS:
        total, fraction = cluster.rps_target, _RPS_TARGET_FRACTION
    else:
        total, fraction = float(container_concurrency) or cluster.concurrency_target, cluster.concurrency_target_fraction
    if "target" in entries:
        total = entries.number("target", total, low=TARGET_MIN)
        if metric == CONCURRENCY and container_concurrency:
            # Aiming above the hard limit would queue requests in every pod.
            total = min(total, float(container_concurrency))
    if "target-utilization-percentage" in entries:
        fraction = entries.number("target-utilization-percentage", 0.0, low=1, high=100) / 100
    return max(TARGET_MIN, total * fraction), total


def _aggregation(entries: Entries, autoscaler_class: str) -> str:
    if autoscaler_class != KPA:
        return LINEAR
    other_spellings = {"weightedExponential": WEIGHTED_EXPONENTIAL, "": LINEAR}
    return entries.text("metric-aggregation-algorithm", LINEAR, (LINEAR, WEIGHTED_EXPONENTIAL), other_spellings)


def _panic_window_s(stable_window_ns: int, percentage: float) -> int:
    """Whole seconds, half a second counting up, and never less than the one second a bucket holds."""
    window_ns = int(float(stable_window_ns) * percentage / 100.0)
    return max(1, (window_ns + NS_PER_S // 2) // NS_PER_S)


def _scales(entries: Entries, cluster: AutoscalerConfig) -> tuple[int, int, int]:
    """Least, most and activation scale; the annotations are compared with each other, not with the cluster's, as in Knative."""
    least, most = entries.whole("min-scale", 0), entries.whole("max-scale", 0)
    if 0 < most < least:
        raise entries.error("max-scale", f"must be at least min-scale ({least}), or 0 for unlimited")
    if "max-scale" in entries and cluster.max_scale_limit and not 1 <= most <= cluster.max_scale_limit:
        raise entries.error("max-scale", f"must be from 1 to the cluster's max-scale-limit ({cluster.max_scale_limit})")
    activation = entries.whole("activation-scale", 0, low=2)
    if activation and activation < least:
        raise entries.error("activation-scale", f"must be at least min-scale ({least})")
    if activation and 0 < most < activation:
        raise entries.error("activation-scale", f"must be at most max-scale ({most})")
    return (
        least if "min-scale" in entries else cluster.min_scale,
        most if "max-scale" in entries else cluster.max_scale,
        activation,
    )


def _initial_scale(entries: Entries, cluster: AutoscalerConfig) -> int:
    initial = entries.whole("initial-scale", cluster.initial_scale)
    if initial == 0 and not cluster.allow_zero_initial_scale:
        raise entries.error("initial-scale", "must be at least 1 while the cluster's allow-zero-initial-scale is false")
    return initial
