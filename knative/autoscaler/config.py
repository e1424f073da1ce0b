"""What a cluster sets for all revisions: the ConfigMap `config-autoscaler`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knative.autoscaler.entries import NS_PER_S, Entries, unknown_name
from knative.autoscaler.errors import SpecError

KPA = "kpa.autoscaling.knative.dev"
HPA = "hpa.autoscaling.knative.dev"

WINDOW_MIN_NS = 6 * NS_PER_S
WINDOW_MAX_NS = 3600 * NS_PER_S
TARGET_MIN = 0.01  # of any metric, per pod
PANIC_WINDOW_PERCENTAGE_MIN, PANIC_WINDOW_PERCENTAGE_MAX = 1.0, 100.0

_PREFIX = "config-autoscaler: "
SETTINGS = frozenset(
    {
        "pod-autoscaler-class",
        "enable-scale-to-zero",
        "allow-zero-initial-scale",
        "max-scale-up-rate",
        "max-scale-down-rate",
        "container-concurrency-target-percentage",
        "container-concurrency-target-default",
        "requests-per-second-target-default",
        "target-burst-capacity",
        "activator-capacity",
        "panic-window-percentage",
        "panic-threshold-percentage",
        "initial-scale",
        "min-scale",
        "max-scale",
        "max-scale-limit",
        "stable-window",
        "scale-down-delay",
        "scale-to-zero-grace-period",
        "scale-to-zero-pod-retention-period",
    }
)


@dataclass(frozen=True)
class AutoscalerConfig:
    """The cluster-wide settings, with Knative's defaults (knative/serving 98e5ef90aa, pkg/autoscaler/config)."""

    pod_autoscaler_class: str = KPA
    enable_scale_to_zero: bool = True
    allow_zero_initial_scale: bool = False
    max_scale_up_rate: float = 1000.0  # most pods wanted per ready pod
    max_scale_down_rate: float = 2.0  # most ready pods per pod wanted
    concurrency_target_fraction: float = 0.7  # of a pod's concurrency, to be aimed at
    concurrency_target: float = 100.0  # requests at once per pod, where containerConcurrency is 0
    rps_target: float = 200.0  # requests per second per pod
    target_burst_capacity: float = 211.0  # requests at once; -1 unlimited
    activator_capacity: float = 100.0  # requests at once per activator
    panic_window_percentage: float = 10.0  # of the stable window
    panic_threshold_percentage: float = 200.0  # of what the ready pods are meant to take
    initial_scale: int = 1
    min_scale: int = 0
    max_scale: int = 0  # 0: unlimited
    max_scale_limit: int = 0  # largest max-scale a revision may ask for; 0: any
    stable_window_ns: int = 60 * NS_PER_S
    scale_down_delay_ns: int = 0
    scale_to_zero_grace_period_ns: int = 30 * NS_PER_S
    scale_to_zero_pod_retention_period_ns: int = 0

    @classmethod
    def parse(cls, data: Mapping[str, str]) -> AutoscalerConfig:
        """The config in the `data` of a ConfigMap, checked as Knative checks it.

        Raises SpecError for a value that Knative refuses, and for a name that it would ignore (but `_example`).
        """
        for name, value in data.items():
            if name not in SETTINGS and name != "_example":
                raise unknown_name(name, _PREFIX + name, value, "setting", {known: known for known in SETTINGS})
        entries = Entries({name: (_PREFIX + name, value) for name, value in data.items()})

        fraction = entries.number("container-concurrency-target-percentage", 70.0, above=0, high=100)
        config = cls(
            pod_autoscaler_class=entries.text("pod-autoscaler-class", KPA, (KPA, HPA)),
            enable_scale_to_zero=entries.flag("enable-scale-to-zero", cls.enable_scale_to_zero),
            allow_zero_initial_scale=entries.flag("allow-zero-initial-scale", cls.allow_zero_initial_scale),
            max_scale_up_rate=entries.number("max-scale-up-rate", cls.max_scale_up_rate, above=1),
            max_scale_down_rate=entries.number("max-scale-down-rate", cls.max_scale_down_rate, above=1),
            # For old times' sake a value up to 1 is a fraction already: "0.7" and "70" are the same.
            concurrency_target_fraction=fraction / 100 if fraction > 1 else fraction,
            concurrency_target=entries.number("container-concurrency-target-default", cls.concurrency_target),
            rps_target=entries.number("requests-per-second-target-default", cls.rps_target, low=TARGET_MIN),
            target_burst_capacity=entries.burst_capacity("target-burst-capacity", cls.target_burst_capacity),
            activator_capacity=entries.number("activator-capacity", cls.activator_capacity, low=1),
            panic_window_percentage=entries.number(
                "panic-window-percentage", cls.panic_window_percentage, low=PANIC_WINDOW_PERCENTAGE_MIN, high=PANIC_WINDOW_PERCENTAGE_MAX
            ),
            # Only the annotation has bounds in Knative; a cluster may set anything.
            panic_threshold_percentage=entries.number("panic-threshold-percentage", cls.panic_threshold_percentage),
            initial_scale=entries.whole("initial-scale", cls.initial_scale),
            min_scale=entries.whole("min-scale", cls.min_scale),
            max_scale=entries.whole("max-scale", cls.max_scale),
            max_scale_limit=entries.whole("max-scale-limit", cls.max_scale_limit),
            stable_window_ns=entries.duration_ns(
                "stable-window", cls.stable_window_ns, low=WINDOW_MIN_NS, high=WINDOW_MAX_NS, whole_seconds=True
            ),
            scale_down_delay_ns=entries.duration_ns("scale-down-delay", cls.scale_down_delay_ns, whole_seconds=True),
            scale_to_zero_grace_period_ns=entries.duration_ns("scale-to-zero-grace-period", cls.scale_to_zero_grace_period_ns, above=0),
            scale_to_zero_pod_retention_period_ns=entries.duration_ns(
                "scale-to-zero-pod-retention-period", cls.scale_to_zero_pod_retention_period_ns
            ),
        )
        _check_together(config, entries)
        return config


def _check_together(config: AutoscalerConfig, entries: Entries) -> None:
    """Raise SpecError where two settings contradict each other."""
    aimed_at = config.concurrency_target_fraction * config.concurrency_target
    if aimed_at < TARGET_MIN:
        raise SpecError(
            f"{_PREFIX}container-concurrency-target-percentage x container-concurrency-target-default",
            aimed_at,
            f"must be at least {TARGET_MIN:g}",
        )
    if config.initial_scale == 0 and not config.allow_zero_initial_scale:
        raise entries.error("initial-scale", "must be at least 1 while allow-zero-initial-scale is false")
    limit = config.max_scale_limit
    if limit and not 1 <= config.max_scale <= limit:
        raise SpecError(f"{_PREFIX}max-scale", config.max_scale, f"must be from 1 to max-scale-limit ({limit})")
    if 0 < config.max_scale < config.min_scale:
        raise SpecError(f"{_PREFIX}min-scale", config.min_scale, f"must be at most max-scale ({config.max_scale})")
