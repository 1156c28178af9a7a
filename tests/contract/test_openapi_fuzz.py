"""The API against its own OpenAPI description: requests that it allows and requests that it forbids, made by schemathesis."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serving.api import create_app
from serving.recommender import Recommender
from serving.scorer import Scorer
from tests.backends import LocalBackend
from tests.bundles import write_bundle

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
ROUTES = [("POST", path) for path in ("/v1/recommend", "/v1/score", "/v1/explain", "/v1/items", "/v1/events")] + [
    ("GET", path) for path in ("/v1/model", "/healthz", "/readyz")
]


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    scorer = Scorer.load(write_bundle(tmp_path_factory.mktemp("fuzz") / "bundle"))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(LocalBackend(Recommender(scorer, "7"))))


def test_every_route_is_here(description: schemathesis.BaseSchema) -> None:
    found = [result.ok() for result in description.get_all_operations()]
    assert {(operation.method.upper(), operation.path) for operation in found} == set(ROUTES)


CASES = [
    (method, path, mode)
    for method, path in ROUTES
    for mode in GenerationMode
    if method == "POST" or mode is GenerationMode.POSITIVE  # a request without anything in it cannot be wrong
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_request_is_answered_as_described_or_refused(
    description: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case: Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
