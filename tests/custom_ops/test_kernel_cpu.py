"""T1: each CPU kernel equals the reference, also those that this processor would not choose."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from trianglemix.custom_ops.library import library_path

from benchmarks.kernel_variants import REQUIRED_FLAGS, build_variants, runs_here
from tests.custom_ops.cases import Case, cases
from tests.custom_ops.operator_session import Backend

BUDGET = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=list(REQUIRED_FLAGS))
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The library with one variant of the kernel chosen beforehand."""
    variants = build_variants()
    if request.param not in variants:
        pytest.skip(f"the {request.param} kernel is not built for this architecture")
    if not runs_here(request.param):
        pytest.skip(f"this processor lacks the instructions of the {request.param} kernel")
    return Backend(variants[request.param])


INSTALLED = Backend(library_path())
FUNCTION = Backend(None)


@settings(BUDGET, max_examples=60)
@given(case=cases("float32"))
def test_float32_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=25)
@given(case=cases("float16"))
def test_float16_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=12)
@given(case=cases("bfloat16", longest=200))
def test_bfloat16_equals_the_reference(kernel: Backend, case: Case) -> None:
    case.check(kernel)


@settings(BUDGET, max_examples=25)
@given(case=cases("float32"))
def test_the_installed_library_equals_the_reference(case: Case) -> None:
    case.check(INSTALLED)
