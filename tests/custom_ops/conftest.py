"""What the operators' tests share: each CPU kernel that this processor can run."""

from __future__ import annotations

import pytest

from benchmarks.kernel_variants import REQUIRED_FLAGS, build_variants, runs_here
from tests.custom_ops.operator_session import Backend


@pytest.fixture(scope="module", params=list(REQUIRED_FLAGS))
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The library with one variant of the kernel chosen beforehand."""
    variants = build_variants()
    if request.param not in variants:
        pytest.skip(f"the {request.param} kernel is not built for this architecture")
    if not runs_here(request.param):
        pytest.skip(f"this processor lacks the instructions of the {request.param} kernel")
    return Backend(variants[request.param])
