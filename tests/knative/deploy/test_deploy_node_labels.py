"""What the agents may change of nodes: the admission policy, evaluated by CEL's own runtime as the API server would.

Not by a cluster: what the API server puts into `request` and how it treats a policy is written down here after its documents.
"""

import copy
from typing import Any

import pytest

from knative.deploy.kubectl import Kubectl
from knative.deploy.render import render
from knative.deploy.variables import Variables

cel = pytest.importorskip("cel_expr_python.cel", reason="cel-expr-python is not installed")

AGENT = "system:serviceaccount:default:relight-weights-agent"
NODE_NAME = "authentication.kubernetes.io/node-name"
NODE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "gpu-1",
        "resourceVersion": "7",
        "labels": {"kubernetes.io/hostname": "gpu-1", "weights.relight/old": "0123"},
        "annotations": {"node.alpha.kubernetes.io/ttl": "0"},
        "managedFields": [{"manager": "kubelet"}],
    },
    "spec": {"podCIDR": "10.0.0.0/24", "taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {"capacity": {"cpu": "8"}},
}


@pytest.fixture(scope="module")
def policy() -> dict[str, Any]:
    objects = render(Variables(env="gpu", namespace="team-a"), Kubectl())
    (binding,) = (item for item in objects if item["kind"] == "ValidatingAdmissionPolicyBinding")
    (found,) = (item for item in objects if item["kind"] == "ValidatingAdmissionPolicy")
    assert (binding["spec"]["policyName"], binding["spec"]["validationActions"]) == (found["metadata"]["name"], ["Deny"])
    assert not [item for item in (binding, found) if "namespace" in item["metadata"]]
    return found


def evaluate(expression: str, **given: Any) -> Any:
    """Raises for what the API server would take as an error, too."""
    types = dict.fromkeys(given, cel.Type.DYN)
    environment = cel.NewEnv(variables=types)
    value = environment.compile(expression).eval(data=given)
    if value.type() == cel.Type.ERROR:
        raise ValueError(f"{expression}: {value}")
    return value.plain_value()


def refusal(policy: dict[str, Any], after: Any, before: Any = NODE, *, user: str = AGENT, extra: Any = None, **request: Any) -> str | None:
    """What the API server says to a change; None if it lets it through."""
    info = {"username": user} | ({} if extra == {} else {"extra": {NODE_NAME: ["gpu-1"]} if extra is None else extra})
    given: dict[str, Any] = {"object": after, "oldObject": before}
    given["request"] = {"operation": "UPDATE", "userInfo": info, "name": "gpu-1", **request}
    spec = policy["spec"]
    if not all(evaluate(condition["expression"], **given) for condition in spec["matchConditions"]):
        return None
    given["variables"] = {}
    for variable in spec["variables"] if before else ():  # which it evaluates when they are used
        given["variables"] = given["variables"] | {variable["name"]: evaluate(variable["expression"], **given)}
    failed = (rule["message"] for rule in spec["validations"] if evaluate(rule["expression"], **given) is not True)
    return next(failed, None)


def changed(place: str, value: Any, node: dict[str, Any] = NODE) -> dict[str, Any]:
    """A node with a value at a place, slashes for dots; without it if that is None."""
    found = copy.deepcopy(node)
    *path, last = place.split(".")
    at = found
    for part in path:
        at = at.setdefault(part, {})
    if value is None:
        del at[last]
    else:
        at[last] = value
    return found


def labelled(**labels: str | None) -> dict[str, Any]:
    """A node with labels below ours, and the kubelet's."""
    found = copy.deepcopy(NODE)
    for name, value in labels.items():
        key = name.replace("__", "/").replace("_", ".")
        found["metadata"]["labels"] |= {key: value}
        if value is None:
            del found["metadata"]["labels"][key]
    return found


@pytest.mark.parametrize(
    ("after", "before"),
    [
        pytest.param(labelled(weights_relight__minilm="abc"), NODE, id="a new label of ours"),
        pytest.param(labelled(weights_relight__old="4567"), NODE, id="another value"),
        pytest.param(labelled(weights_relight__old=None), NODE, id="a label of ours goes"),
        pytest.param(changed("metadata.resourceVersion", "8", changed("metadata.managedFields", [])), NODE, id="what every change changes"),
        pytest.param(labelled(weights_relight__a="b"), changed("metadata.labels", {"kubernetes.io/hostname": "gpu-1"}), id="the first one"),
        pytest.param(changed("spec", None), changed("spec", None), id="a node without a spec"),
    ],
)
def test_an_agent_labels_its_own_node(policy: dict[str, Any], after: dict[str, Any], before: dict[str, Any]) -> None:
    assert refusal(policy, after, before) is None


@pytest.mark.parametrize(
    ("after", "said"),
    [
        pytest.param(labelled(team="mine"), "labels below", id="another label"),
        pytest.param(labelled(kubernetes_io__hostname="other"), "labels below", id="another value of another label"),
        pytest.param(labelled(kubernetes_io__hostname=None), "labels below", id="another label goes"),
        pytest.param(changed("metadata.labels", None), "labels below", id="all labels go"),
        pytest.param(labelled(evil_weights_relight__a="b"), "labels below", id="one that only ends like ours"),
        pytest.param(changed("spec.taints", []), "nothing of a node but", id="taints"),
        pytest.param(changed("spec.unschedulable", True), "nothing of a node but", id="cordon"),
        pytest.param(changed("spec", None), "nothing of a node but", id="the whole spec"),
        pytest.param(changed("metadata.annotations", {"a": "b"}), "nothing of a node but", id="annotations"),
        pytest.param(changed("metadata.annotations", None), "nothing of a node but", id="no annotations"),
        pytest.param(changed("metadata.finalizers", ["a/b"]), "nothing of a node but", id="finalizers"),
        pytest.param(changed("metadata.ownerReferences", [{"name": "x"}]), "nothing of a node but", id="owners"),
        pytest.param(changed("metadata.name", "gpu-2"), "its pod runs on", id="another node"),
    ],
)
def test_an_agent_changes_nothing_else(policy: dict[str, Any], after: dict[str, Any], said: str) -> None:
    assert said in (refusal(policy, after) or "")


@pytest.mark.parametrize(
    "extra",
    [{}, {"other": ["gpu-1"]}, {NODE_NAME: ["gpu-2"]}, {NODE_NAME: []}],
    ids=["a token of no pod", "a token without its node", "of another node", "of no node"],
)
def test_a_token_that_does_not_name_the_node_is_refused(policy: dict[str, Any], extra: dict[str, list[str]]) -> None:
    assert "its pod runs on" in (refusal(policy, labelled(weights_relight__a="b"), extra=extra) or "")


def test_the_status_and_a_new_node_are_refused(policy: dict[str, Any]) -> None:
    assert "a node that is there" in (refusal(policy, NODE, subResource="status") or "")
    assert "a node that is there" in (refusal(policy, NODE, None, operation="CREATE") or "")
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE", "UPDATE"], ["nodes", "nodes/status"])
    assert policy["spec"]["failurePolicy"] == "Fail"


@pytest.mark.parametrize(
    ("user", "is_bound"),
    [
        ("system:serviceaccount:team-a:relight-weights-agent", True),
        ("system:serviceaccount:default:my-relight-weights-agent", False),
        ("system:node:gpu-1", False),
        ("relight-weights-agent", False),
        ("kubernetes-admin", False),
    ],
)
def test_the_policy_is_for_the_agents_of_every_namespace_and_for_nobody_else(policy: dict[str, Any], user: str, is_bound: bool) -> None:
    assert (refusal(policy, changed("spec.unschedulable", True), user=user) is not None) == is_bound
