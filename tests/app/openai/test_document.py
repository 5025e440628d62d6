"""The API against its own OpenAPI document, by requests that schemathesis makes up."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from support.app_thread import GreyRunner, serving
from support.packages import need
from support.slow import slow

need("schemathesis")

import schemathesis  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

pytestmark = slow
ANSWERED = Counter()
# Of each operation, of each mode.
CASES = 250
# A size that fits the pattern may still be no multiple of a token.
NOT_PROMISED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), GreyRunner()) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/v1/openapi.json")


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/images/generations", GenerationMode.POSITIVE),
        ("/images/generations", GenerationMode.NEGATIVE),
        ("/images/edits", GenerationMode.POSITIVE),
        ("/images/edits", GenerationMode.NEGATIVE),
        ("/models/{model}", GenerationMode.POSITIVE),
    ],
)
def test_no_request_breaks_it_and_all_answers_are_as_documented(schema, path, mode):
    (operation,) = (one.ok() for one in schema.get_all_operations() if one.ok().path == path)

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        answer = case.call_and_validate(excluded_checks=NOT_PROMISED)
        ANSWERED[answer.status_code] += 1

    check()


def test_as_many_requests_as_were_to_be():
    assert ANSWERED.total() >= 1000, ANSWERED
    assert ANSWERED[200] > 20, ANSWERED
    assert ANSWERED[400] > 50, ANSWERED
    assert not [status for status in ANSWERED if status >= 500 or status == 429], ANSWERED
