"""Where kernels run in tests: on a GPU, else in Triton's interpreter (TRITON_INTERPRET=1), else nowhere."""

import pytest
import torch

from dfs_engine.kernels.config import INTERPRETED
from dfs_engine.runtime.precision import fp32_precision

pytest.importorskip("triton")


@pytest.fixture
def device() -> str:
    """Skips where there is neither a GPU nor the interpreter."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set before Python started")
    return "cuda"


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request, device) -> torch.dtype:
    """Every dtype that kernels take."""
    if request.param == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and says nothing")
    return request.param


@pytest.fixture(autouse=True)
def _ieee():
    """float32 means float32, whatever the device's defaults are: convolutions would use tf32."""
    with fp32_precision("ieee"):
        yield
