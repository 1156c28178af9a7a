"""The admission policies as an API server evaluates them (CEL): what they let in, and what they refuse."""

import copy
from typing import Any

import cel
import pytest

from tests.k8s.manifests import Object, named, namespace_labels, needs_kubectl, overlay, pods
from tests.k8s.rules import ray_kinds

pytestmark = needs_kubectl

RELEASED = "sha256:" + "ab" * 32
ZEROS = "sha256:" + "0" * 64


def refusals(objects: list[Object], policy: str, item: Object) -> list[str]:
    """Messages of the validations that a policy does not let an object pass."""
    spec = named(objects, "ValidatingAdmissionPolicy", policy)["spec"]
    context: dict[str, Any] = {"object": item, "variables": {}}
    for variable in spec.get("variables", []):
        context["variables"][variable["name"]] = cel.evaluate(variable["expression"], context)
    return [rule["message"] for rule in spec["validations"] if not cel.evaluate(rule["expression"], context)]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return overlay("prod")


def released(spec: Object) -> Object:
    """A pod's spec with the digests of a release in place of the zeros."""
    changed = copy.deepcopy(spec)
    for container in [*changed.get("initContainers", []), *changed["containers"]]:
        container["image"] = container["image"].replace(ZEROS, RELEASED)
    return changed


def test_pods_of_a_release_are_let_in_and_those_with_placeholders_are_not(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert refusals(objects, "cllmr-images-by-digest", {"kind": "Pod", "spec": released(pod.spec)}) == []
        (message,) = refusals(objects, "cllmr-images-by-digest", {"kind": "Pod", "spec": pod.spec})
        assert "placeholder" in message


@pytest.mark.parametrize("image", ["a/b:1", "a/b", "a/b@sha256:12", f"a/b@{RELEASED}x"])
@pytest.mark.parametrize("kind", ["containers", "initContainers"])
def test_an_image_that_is_not_given_by_digest_is_refused(objects: list[Object], image: str, kind: str) -> None:
    spec = {"containers": [{"image": f"a/b@{RELEASED}"}]}
    spec[kind] = [{"image": image}]
    (message,) = refusals(objects, "cllmr-images-by-digest", {"kind": "Pod", "spec": spec})
    assert "must be given by digest" in message


def test_ray_resources_with_token_authentication_are_let_in_and_others_are_not(objects: list[Object]) -> None:
    for item in ray_kinds(objects):
        assert refusals(objects, "cllmr-ray-token-auth", item) == []
        open_to_all = copy.deepcopy(item)
        cluster = open_to_all["spec"].get("rayClusterConfig") or open_to_all["spec"]["rayClusterSpec"]
        for options in ({"mode": "disabled"}, {}, None):
            cluster["authOptions"] = options
            if options is None:
                del cluster["authOptions"]
            assert refusals(objects, "cllmr-ray-token-auth", open_to_all) != []
    bare = {"kind": "RayCluster", "spec": {"authOptions": {"mode": "token"}}}
    assert refusals(objects, "cllmr-ray-token-auth", bare) == []


def test_both_policies_are_bound_to_the_namespaces_of_the_platform(objects: list[Object]) -> None:
    labels = namespace_labels(objects)
    for policy in ("cllmr-images-by-digest", "cllmr-ray-token-auth"):
        binding = named(objects, "ValidatingAdmissionPolicyBinding", policy)["spec"]
        assert binding["validationActions"] == ["Deny"]
        assert binding["matchResources"]["namespaceSelector"]["matchLabels"].items() <= labels.items()
