import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import Joint, create_method, exit_losses, list_methods
from dfs_engine.models import create_model


def test_loss_and_gradient_are_those_of_the_sum():
    logits = [torch.randn(5, 7, requires_grad=True) for _ in range(3)]
    target = torch.randint(7, (5,))
    loss = Joint()(logits, target)
    expected = torch.stack([F.cross_entropy(exit_logits, target) for exit_logits in logits])
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(exit_losses(logits, target), expected)
    loss.backward()
    for exit_logits in logits:
        torch.testing.assert_close(exit_logits.grad, (exit_logits.softmax(1) - F.one_hot(target, 7)).detach() / 5)


def test_registry():
    model = create_model("vgg7_64", width=2)
    assert {"joint", "byot", "ge", "bdl1", "bdl2", "wpn", "meta_gf", "dr_mgf"} <= {*list_methods()}
    assert isinstance(create_method("joint", model), Joint)
    with pytest.raises(ValueError, match=r"method: expected one of bdl1, .*joint, .*got 'jiont'. Did you mean 'joint'"):
        create_method("jiont", model)
