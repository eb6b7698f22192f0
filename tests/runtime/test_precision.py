"""float32 is multiplied as it is said, by every kind of product, and as before afterwards."""

import pytest
import torch

from dfs_engine.runtime.precision import fp32_precision


def settings() -> list[str]:
    backends = torch.backends
    return [
        owner.fp32_precision
        for owner in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    ]


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_products_and_convolutions_follow_and_are_put_back(value):
    before = settings()
    with fp32_precision(value):
        assert set(settings()) == {value}
    assert settings() == before
    with pytest.raises(ZeroDivisionError), fp32_precision(value):
        _ = 1 / 0
    assert settings() == before


def test_what_the_global_setting_leaves_alone_is_set_too():
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    try:
        with fp32_precision("ieee"):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_an_unknown_value_leaves_nothing_half_set():
    before = settings()
    with pytest.raises(RuntimeError), fp32_precision("tf23"):
        pass
    assert settings() == before
