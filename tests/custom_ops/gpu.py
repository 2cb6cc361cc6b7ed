"""What tests on a GPU, through ONNX Runtime's CUDA provider, begin with."""

from __future__ import annotations

from typing import Final

import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, settings
from trianglemix.custom_ops.library import library_path

from tests.custom_ops.operator_session import Backend

PROVIDER: Final = "CUDAExecutionProvider"
CUDA: Final = Backend(library_path(), PROVIDER)
NEEDS_GPU: Final = (
    pytest.mark.gpu,
    pytest.mark.skipif(
        PROVIDER not in ort.get_available_providers(), reason="no GPU: needs onnxruntime-gpu"
    ),
)
BUDGET: Final = settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
