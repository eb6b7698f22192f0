"""Putting this engine's dropout into a model."""

from torch import nn

from dfs_engine.nn import Dropout, convert_dropouts


def test_conversion_keeps_rates_modes_and_what_works_in_place():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2).eval()), nn.Dropout(0.3, inplace=True))
    convert_dropouts(model, "aten")
    first, (second,), third = model
    assert type(first) is Dropout
    assert first.p == 0.1
    assert first.training
    assert first.backend == "aten"
    assert type(second) is Dropout
    assert second.p == 0.2
    assert not second.training
    assert type(third) is nn.Dropout
