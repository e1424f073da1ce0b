"""What a revision may ask for, and what is said to one that asks for something else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knative.autoscaler import ScaleSpec, SpecError
from knative.autoscaler.config import SETTINGS, AutoscalerConfig
from knative.autoscaler.entries import format_duration, parse_duration_ns

STEADY = settings(derandomize=True, deadline=None, max_examples=200)

MOST = 2147483647


def test_nothing_set_gives_knatives_defaults() -> None:
    assert ScaleSpec.parse({}) == ScaleSpec()
    assert AutoscalerConfig.parse({}) == AutoscalerConfig()


def test_annotations_are_taken_with_their_prefix_and_without_it() -> None:
    assert ScaleSpec.parse({"autoscaling.knative.dev/min-scale": "2"}) == ScaleSpec.parse({"min-scale": "2"}) == ScaleSpec(min_scale=2)


def test_annotations_of_others_are_left_alone() -> None:
    others = {"kubectl.kubernetes.io/restartedAt": "x", "autoscaling.internal.knative.dev/windw": "x", "serving.knative.dev/creator": "x"}
    assert ScaleSpec.parse(others) == ScaleSpec()


def test_the_progress_deadline_is_taken_from_serving() -> None:
    assert ScaleSpec.parse({"serving.knative.dev/progress-deadline": "20m"}).progress_deadline_s == 1200


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("minScale", "1", "min_scale", 1),
        ("maxScale", "3", "max_scale", 3),
        ("initialScale", "2", "initial_scale", 2),
        ("scaleDownDelay", "15s", "scale_down_delay_s", 15.0),
        ("scaleToZeroPodRetentionPeriod", "1m5s", "scale_to_zero_pod_retention_period_s", 65.0),
        ("targetBurstCapacity", "-1", "target_burst_capacity", -1.0),
        ("targetUtilizationPercentage", "50", "target", 50.0),
        ("panicWindowPercentage", "20", "panic_window_s", 12),
        ("panicThresholdPercentage", "150", "panic_threshold", 1.5),
        ("metricAggregationAlgorithm", "weightedExponential", "aggregation", "weighted-exponential"),
    ],
)
def test_the_older_spellings_are_taken_too(name: str, text: str, field: str, value: object) -> None:
    assert getattr(ScaleSpec.parse({f"autoscaling.knative.dev/{name}": text}), field) == value


@pytest.mark.parametrize("names", [("min-scale", "minScale"), ("minScale", "min-scale")])
def test_the_canonical_spelling_wins_over_the_older_one(names: tuple[str, str]) -> None:
    texts = {"min-scale": "2", "minScale": "1"}
    assert ScaleSpec.parse({name: texts[name] for name in names}).min_scale == 2


@pytest.mark.parametrize(
    ("annotations", "container_concurrency", "config", "target", "total"),
    [
        pytest.param({}, 10, {}, 7.0, 10.0, id="70 % of the container concurrency"),
        pytest.param({"target": "4"}, 10, {}, 2.8, 4.0, id="a target below the container concurrency"),
        pytest.param({"target": "40"}, 10, {}, 7.0, 10.0, id="a target above it is cut down to it"),
        pytest.param({"target": "400"}, 0, {}, 280.0, 400.0, id="without a limit the target stands"),
        pytest.param({"target-utilization-percentage": "100"}, 10, {}, 10.0, 10.0, id="the utilisation is of the total"),
        pytest.param({"metric": "rps"}, 10, {}, 140.0, 200.0, id="requests per second have a default of their own"),
        pytest.param({"metric": "rps", "target": "50"}, 10, {}, 35.0, 50.0, id="and no limit by concurrency"),
        pytest.param({"target": "0.01"}, 0, {}, 0.01, 0.01, id="no target is below a hundredth"),
        pytest.param({}, 10, {"container-concurrency-target-percentage": "50"}, 5.0, 10.0, id="the cluster's percentage"),
        pytest.param({}, 10, {"container-concurrency-target-percentage": "0.5"}, 5.0, 10.0, id="which may be a fraction"),
        pytest.param({}, 10, {"container-concurrency-target-percentage": "1"}, 10.0, 10.0, id="1 is all, not 1 %"),
        pytest.param({}, 10, {"container-concurrency-target-percentage": "1.5"}, 0.15, 10.0, id="more is a percentage"),
        pytest.param({}, 0, {"container-concurrency-target-default": "20"}, 14.0, 20.0, id="the cluster's default target"),
    ],
)
def test_the_target_of_a_pod_comes_from_several_places(
    annotations: dict[str, str], container_concurrency: int, config: dict[str, str], target: float, total: float
) -> None:
    spec = ScaleSpec.parse(annotations, container_concurrency, config)
    assert spec.target == pytest.approx(target)
    assert spec.total == total


@pytest.mark.parametrize(
    ("window", "percentage", "panic_window_s"),
    [("60s", "10", 6), ("6s", "1", 1), ("6s", "100", 6), ("1m5s", "10", 7), ("65s", "9", 6), ("1h", "10", 360), ("15s", "10", 2)],
)
def test_the_panic_window_is_rounded_to_whole_seconds(window: str, percentage: str, panic_window_s: int) -> None:
    assert ScaleSpec.parse({"window": window, "panic-window-percentage": percentage}).panic_window_s == panic_window_s


def test_an_annotation_overrides_the_cluster() -> None:
    config = {"min-scale": "1", "max-scale": "5", "stable-window": "30s", "target-burst-capacity": "0", "_example": "not read"}
    spec = ScaleSpec.parse({"min-scale": "0", "window": "10s"}, config=config)
    assert (spec.min_scale, spec.max_scale, spec.stable_window_s, spec.target_burst_capacity) == (0, 5, 10, 0.0)


def test_the_cluster_sets_what_no_annotation_can() -> None:
    config = {
        "enable-scale-to-zero": "F",
        "max-scale-up-rate": "1.5",
        "max-scale-down-rate": "3",
        "scale-to-zero-grace-period": "1500ms",
        "activator-capacity": "10",
    }
    spec = ScaleSpec.parse({}, config=config)
    assert (spec.enable_scale_to_zero, spec.max_scale_up_rate, spec.max_scale_down_rate) == (False, 1.5, 3.0)
    assert (spec.scale_to_zero_grace_period_s, spec.activator_capacity) == (1.5, 10.0)


def test_an_initial_scale_of_0_needs_the_clusters_leave() -> None:
    allowed = {"allow-zero-initial-scale": "true"}
    assert ScaleSpec.parse({"initial-scale": "0"}, config=allowed).initial_scale == 0
    assert ScaleSpec.parse({}, config=allowed | {"initial-scale": "0"}).initial_scale == 0


def test_the_hpa_may_scale_on_any_metric() -> None:
    hpa = {"class": "hpa.autoscaling.knative.dev"}
    assert ScaleSpec.parse(hpa).metric == "cpu"
    assert ScaleSpec.parse(hpa | {"metric": "queue_length", "metric-aggregation-algorithm": "its own"}).metric == "queue_length"


@pytest.mark.parametrize(
    ("annotations", "config"),
    [
        ({"window": "6s"}, {}),
        ({"window": "1h"}, {}),
        ({"target": "0.01", "target-utilization-percentage": "1"}, {}),
        ({"target-utilization-percentage": "100"}, {}),
        ({"panic-window-percentage": "1", "panic-threshold-percentage": "110"}, {}),
        ({"panic-window-percentage": "100", "panic-threshold-percentage": "1000"}, {}),
        ({"min-scale": "2", "max-scale": "2", "activation-scale": "2"}, {}),
        ({"min-scale": "2147483647", "max-scale": "0"}, {}),
        ({"initial-scale": "1", "activation-scale": "2"}, {}),
        ({"max-scale": "1"}, {"max-scale": "1", "max-scale-limit": "1"}),
        ({"min-scale": "3"}, {"max-scale": "2"}),  # as in Knative, not compared with each other
        ({"scale-down-delay": "0s", "scale-to-zero-pod-retention-period": "0s"}, {}),
        ({"scale-down-delay": "1h", "scale-to-zero-pod-retention-period": "1h"}, {}),
        ({"target-burst-capacity": "0"}, {"target-burst-capacity": "-1"}),
        ({}, {"max-scale-up-rate": "1.001", "max-scale-down-rate": "1.001", "activator-capacity": "1"}),
        ({}, {"stable-window": "6s", "scale-to-zero-grace-period": "1ns", "panic-window-percentage": "1"}),
        ({}, {"stable-window": "1h", "scale-down-delay": "2h", "panic-window-percentage": "100"}),
        ({}, {"container-concurrency-target-percentage": "1", "container-concurrency-target-default": "0.01"}),
        ({}, {"container-concurrency-target-percentage": "100", "requests-per-second-target-default": "0.01"}),
        ({}, {"min-scale": "2"}),
        ({}, {"min-scale": "2", "max-scale": "2", "panic-threshold-percentage": "0"}),
        ({"serving.knative.dev/progress-deadline": "0s"}, {}),
    ],
    ids=str,
)
def test_the_bounds_themselves_are_allowed(annotations: dict[str, str], config: dict[str, str]) -> None:
    assert isinstance(ScaleSpec.parse(annotations, config=config), ScaleSpec)


@pytest.mark.parametrize("container_concurrency", [0, 1000])
def test_container_concurrency_reaches_from_none_to_a_thousand(container_concurrency: int) -> None:
    assert ScaleSpec.parse({}, container_concurrency).total == (container_concurrency or 100)


BAD_ANNOTATIONS = [
    ("class", "kpa", "must be kpa.autoscaling.knative.dev or hpa.autoscaling.knative.dev"),
    ("metric", "cpu", "must be concurrency or rps"),
    ("metric-aggregation-algorithm", "exponential", "must be linear or weighted-exponential"),
    ("target", "0.009", "must be a number of at least 0.01"),
    ("target", "ten", "must be a number of at least 0.01"),
    ("target", "nan", "must be a number of at least 0.01"),
    ("target", "1e999", "must be a number of at least 0.01"),
    ("target-utilization-percentage", "0.7", "must be a number from 1 to 100"),
    ("targetUtilizationPercentage", "101", "must be a number from 1 to 100"),
    ("window", "5s", "must be a duration from 6s to 1h, in whole seconds"),
    ("window", "61m", "must be a duration from 6s to 1h, in whole seconds"),
    ("window", "6500ms", "must be a duration from 6s to 1h, in whole seconds"),
    ("window", "9" * 5000 + "s", "must be a duration from 6s to 1h, in whole seconds"),
    ("window", "60", "must be a duration from 6s to 1h, in whole seconds"),
    ("panic-window-percentage", "0.9", "must be a number from 1 to 100"),
    ("panic-threshold-percentage", "109", "must be a number from 110 to 1000"),
    ("panic-threshold-percentage", "1001", "must be a number from 110 to 1000"),
    ("min-scale", "-1", f"must be a whole number from 0 to {MOST}"),
    ("min-scale", "1.0", f"must be a whole number from 0 to {MOST}"),
    ("min-scale", "9" * 5000, f"must be a whole number from 0 to {MOST}"),
    ("max-scale", "2147483648", f"must be a whole number from 0 to {MOST}"),
    ("initial-scale", "0", "must be at least 1 while the cluster's allow-zero-initial-scale is false"),
    ("initial-scale", "", f"must be a whole number from 0 to {MOST}"),
    ("activation-scale", "1", f"must be a whole number from 2 to {MOST}"),
    ("scale-down-delay", "-1s", "must be a duration from 0s to 1h, in whole seconds"),
    ("scale-down-delay", "1.5s", "must be a duration from 0s to 1h, in whole seconds"),
    ("scale-to-zero-pod-retention-period", "1h1s", "must be a duration from 0s to 1h"),
    ("target-burst-capacity", "-2", "must be at least 0, or -1 for unlimited"),
    ("target-burst-capacity", "unlimited", "must be at least 0, or -1 for unlimited"),
    ("scale-to-zero-pod-retention-period", "soon", "must be a duration from 0s to 1h"),
    ("min-scal", "1", "there is no such annotation; did you mean min-scale?"),
    ("minscale", "1", "there is no such annotation; did you mean min-scale?"),
    ("maxScal", "1", "there is no such annotation; did you mean max-scale?"),
    ("max-scale-up-rate", "2", "is for the whole cluster: set it in config-autoscaler"),
]


@pytest.mark.parametrize(("name", "value", "problem"), BAD_ANNOTATIONS)
def test_a_bad_annotation_is_refused_with_its_name_its_value_and_what_is_allowed(name: str, value: str, problem: str) -> None:
    written = f"autoscaling.knative.dev/{name}"
    with pytest.raises(SpecError) as caught:
        ScaleSpec.parse({written: value})
    assert str(caught.value) == f"{written} = '{value}', {problem}"
    assert (caught.value.name, caught.value.value, caught.value.problem) == (written, value, problem)


BAD_SETTINGS = [
    ("pod-autoscaler-class", "x.knative.dev", "must be kpa.autoscaling.knative.dev or hpa.autoscaling.knative.dev"),
    ("enable-scale-to-zero", "yes", "must be true or false"),
    ("max-scale-up-rate", "1", "must be a number above 1"),
    ("max-scale-down-rate", "1.0", "must be a number above 1"),
    ("container-concurrency-target-percentage", "0", "must be a number above 0 and at most 100"),
    ("container-concurrency-target-percentage", "100.1", "must be a number above 0 and at most 100"),
    ("requests-per-second-target-default", "0", "must be a number of at least 0.01"),
    ("activator-capacity", "0.5", "must be a number of at least 1"),
    ("target-burst-capacity", "-0.5", "must be at least 0, or -1 for unlimited"),
    ("panic-window-percentage", "101", "must be a number from 1 to 100"),
    ("initial-scale", "0", "must be at least 1 while allow-zero-initial-scale is false"),
    ("min-scale", "x", f"must be a whole number from 0 to {MOST}"),
    ("max-scale-limit", "-1", f"must be a whole number from 0 to {MOST}"),
    ("stable-window", "2h", "must be a duration from 6s to 1h, in whole seconds"),
    ("scale-down-delay", "1ms", "must be a duration of at least 0s, in whole seconds"),
    ("scale-to-zero-grace-period", "0s", "must be a duration above 0s"),
    ("scale-to-zero-pod-retention-period", "-1s", "must be a duration of at least 0s"),
    ("stabel-window", "60s", "there is no such setting; did you mean stable-window?"),
]


@pytest.mark.parametrize(("name", "value", "problem"), BAD_SETTINGS)
def test_a_bad_cluster_setting_is_refused_likewise(name: str, value: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        ScaleSpec.parse({}, config={name: value})
    assert str(caught.value) == f"config-autoscaler: {name} = '{value}', {problem}"


@pytest.mark.parametrize(
    ("annotations", "config", "name", "problem"),
    [
        pytest.param({"min-scale": "3", "max-scale": "2"}, {}, "max-scale", "min-scale (3)", id="max below min"),
        pytest.param({"min-scale": "2", "max-scale": "1"}, {}, "max-scale", "min-scale (2)", id="a max of one below min"),
        pytest.param({"min-scale": "3", "activation-scale": "2"}, {}, "activation-scale", "min-scale (3)", id="activation below min"),
        pytest.param({"max-scale": "3", "activation-scale": "4"}, {}, "activation-scale", "max-scale (3)", id="activation above max"),
        pytest.param({"max-scale": "1", "activation-scale": "2"}, {}, "activation-scale", "max-scale (1)", id="activation above one"),
        pytest.param({"max-scale": "6"}, {"max-scale": "5", "max-scale-limit": "5"}, "max-scale", "limit (5)", id="max above the limit"),
        pytest.param({"max-scale": "0"}, {"max-scale": "5", "max-scale-limit": "5"}, "max-scale", "limit (5)", id="unlimited is above it"),
        pytest.param({}, {"max-scale-limit": "5"}, "config-autoscaler: max-scale", "limit (5)", id="the cluster itself unlimited"),
        pytest.param({}, {"min-scale": "3", "max-scale": "2"}, "config-autoscaler: min-scale", "max-scale (2)", id="the cluster's min"),
        pytest.param({}, {"min-scale": "2", "max-scale": "1"}, "config-autoscaler: min-scale", "max-scale (1)", id="a max of one there"),
        pytest.param(
            {},
            {"container-concurrency-target-default": "0.01"},
            "config-autoscaler: container-concurrency-target-percentage x container-concurrency-target-default",
            "at least 0.01",
            id="percentage and default together",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    annotations: dict[str, str], config: dict[str, str], name: str, problem: str
) -> None:
    with pytest.raises(SpecError) as caught:
        ScaleSpec.parse(annotations, config=config)
    assert caught.value.name == name
    assert problem in caught.value.problem


def test_a_name_like_no_other_is_answered_with_all_there_are() -> None:
    with pytest.raises(SpecError, match=r"known are activation-scale, class, .*, window$"):
        ScaleSpec.parse({"xyz": "1"})


def test_a_message_is_one_line_whatever_was_written() -> None:
    with pytest.raises(SpecError) as caught:
        ScaleSpec.parse({"win\ndow": "5\ns"})
    assert str(caught.value) == r"'win\ndow' = '5\ns', there is no such annotation; did you mean window?"


@pytest.mark.parametrize("value", [3, 3.0, True, None, ["3"]])
def test_a_value_that_is_not_a_string_is_refused_as_kubernetes_does(value: object) -> None:
    with pytest.raises(SpecError, match=r"min-scale = .*, must be a string: put it in quotes$"):
        ScaleSpec.parse({"min-scale": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [-1, 1001, 2.0, "2", True, None])
def test_a_bad_container_concurrency_is_refused(value: object) -> None:
    with pytest.raises(SpecError, match=r"^containerConcurrency = .*, must be a whole number from 0 to 1000$"):
        ScaleSpec.parse({}, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_no_known_setting_is_ignored(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        ScaleSpec.parse({}, config={name: "?"})
    assert caught.value.name == f"config-autoscaler: {name}"


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("6s", 6_000_000_000),
        ("1m30s", 90_000_000_000),
        ("1h", 3_600_000_000_000),
        ("1.5h", 5_400_000_000_000),
        (".5s", 500_000_000),
        ("1.s", 1_000_000_000),
        ("-2ms", -2_000_000),
        ("+3us", 3_000),
        ("3\u00b5s4ns", 3_004),  # micro sign
        ("3\u03bcs4ns", 3_004),  # Greek mu
        ("0.0000000009s", 0),
    ],
)
def test_durations_are_read_as_go_reads_them(text: str, ns: int) -> None:
    assert parse_duration_ns(text) == ns


@pytest.mark.parametrize("text", ["", "s", "6", ".s", "6 s", " 6s", "6s ", "6d", "--6s", "6sm", "6S", "one", "٦s", "9" * 20 + "s"])
def test_what_go_would_not_read_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration_ns(text)


@STEADY
@given(ns=st.integers(0, 10**14))
def test_a_duration_survives_being_written_and_read_in_parts(ns: int) -> None:
    seconds, rest = divmod(ns, 10**9)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    assert parse_duration_ns(f"{hours}h{minutes}m{seconds % 60}.{rest:09d}s") == ns


@pytest.mark.parametrize(("ns", "text"), [(0, "0s"), (10**9, "1s"), (9 * 10**10, "90s"), (12 * 10**10, "2m"), (36 * 10**11, "1h")])
def test_durations_in_messages_are_short(ns: int, text: str) -> None:
    assert format_duration(ns) == text


@STEADY
@given(st.dictionaries(st.sampled_from(["window", "target", "min-scale", "scaleDownDelay", "class", "zz"]), st.text(max_size=8)))
def test_any_text_is_either_taken_or_refused_with_a_message(annotations: dict[str, str]) -> None:
    refused: str | None = None
    spec = ScaleSpec()
    try:
        spec = ScaleSpec.parse(annotations)
    except SpecError as err:
        refused = err.name
    assert refused is None or refused in annotations
    assert spec.target >= 0.01
    assert 6 <= spec.stable_window_s <= 3600
