"""Cosines of exits' gradients against a direct computation, and what surgery's parts have in common: nothing."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import dfs_engine
from dfs_engine.evaluation.conflicts import block_of, measure_conflicts, summarise
from dfs_engine.models import create_model


def toy(variant="dense", **options):
    return create_model("vgg7_64", num_classes=3, width=4, variant=variant, dtype=torch.float64, **options)


def batches(count=3, size=5):
    return [(torch.randn(size, 3, 8, 8, dtype=torch.float64), torch.randint(3, (size,))) for _ in range(count)]


def test_cosines_are_those_of_separate_backwards():
    model, data = toy(), batches()
    found = {(p.level, p.block, p.parameter, p.exit, p.other): p for p in measure_conflicts(model, data)}
    names = [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
    vectors = {}  # (exit, batch) -> name -> gradient
    for exit, (number, (images, target)) in itertools.product(range(6), enumerate(data)):
        model.zero_grad()
        F.cross_entropy(model(images)[exit], target).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if name in names and p.grad is not None}
        vectors[exit, number] = {name: gradient.clone().flatten() for name, gradient in grads.items()}
    groups = {("parameter", block_of(name), name): [name] for name in names}
    for index in range(5):
        groups["block", f"block {index + 1}", ""] = [name for name in names if name.startswith(f"blocks.{index}.")]
    groups["network", "", ""] = names
    checked = 0
    for (level, block, parameter), members in groups.items():
        for exit, other in itertools.combinations(range(6), 2):
            if not any(name in vectors[exit, 0] for name in members):
                assert (level, block, parameter, exit + 1, other + 1) not in found
                continue
            cosines = []
            for number in range(len(data)):
                pair = [
                    torch.cat([
                        vectors[each, number].get(name, torch.zeros(model.get_parameter(name).numel()).double())
                        for name in members
                    ])
                    for each in (exit, other)
                ]  # fmt: skip
                cosines.append(F.cosine_similarity(*pair, dim=0).item())
            measured = found.pop((level, block, parameter, exit + 1, other + 1))
            assert measured.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
            assert measured.negative == pytest.approx(sum(value < 0 for value in cosines) / len(cosines))
            assert measured.kind == "shared"
            checked += 1
    assert not found
    assert checked == 120 + 35 + 15  # of weights, of blocks, of the network


@pytest.mark.parametrize("variant", ["dfs", "detach"])
def test_parts_of_surgery_have_no_element_in_common(variant):
    pairs = measure_conflicts(toy(variant, beta=0.5), batches())
    for pair in pairs:
        block = pair.exit if pair.level == "network" else int(pair.block.removeprefix("block "))
        if pair.level == "network":
            # All that exit 1 trains is f- of block 1, and no other exit trains it.
            assert (pair.kind == "disjoint") == (pair.exit == 1)
        elif pair.kind == "disjoint":
            assert (pair.exit, pair.cosine, pair.negative, pair.overlap) == (block, 0, 0, 0)
        else:
            assert pair.exit > block
            assert pair.overlap > 0
    assert {pair.kind for pair in pairs if pair.level == "parameter"} == {"shared", "disjoint"}
    whole = measure_conflicts(toy(variant, beta=0.5, exit_gradient="whole"), batches())
    assert {pair.kind for pair in whole} == {"shared"}
    half = [pair.overlap for pair in whole if pair.block == f"block {pair.exit}" and pair.level == "block"]
    assert all(0 < overlap < 1 for overlap in half)  # where a ReLU lets nothing through, fewer elements count


def test_a_gradient_of_zeros_is_no_conflict():
    """At beta = 0 no exit trains what another does."""
    for variant in ("dfs", "detach"):
        pairs = measure_conflicts(toy(variant, beta=0.0), batches(1))
        assert {(pair.kind, pair.cosine) for pair in pairs} == {("disjoint", 0.0)}
        assert summarise(pairs)[-1].num_shared == 0


def test_summary_counts_weights_and_pairs():
    pairs = measure_conflicts(toy("dfs"), batches())
    *blocks, network = summarise(pairs)
    assert [one.name for one in blocks] == [f"block {index}" for index in range(1, 6)]
    assert network.num_shared == sum(one.num_shared for one in blocks)
    assert network.num_disjoint == sum(one.num_disjoint for one in blocks)
    # Block i has 3 weights (the first one 4) and a pair of exit i with each deeper one, and those of the deeper ones.
    assert [one.num_disjoint for one in blocks] == [4 * 5, 3 * 4, 3 * 3, 3 * 2, 3 * 1]
    assert [one.num_shared for one in blocks] == [4 * 10, 3 * 6, 3 * 3, 3 * 1, 0]
    shared = [pair for pair in pairs if pair.level == "parameter" and pair.kind == "shared"]
    assert network.negative == pytest.approx(sum(pair.negative for pair in shared) / len(shared))
    assert network.lowest.cosine == min(pair.cosine for pair in shared)


def test_the_model_is_left_as_it_was():
    model = toy("dfs").eval()
    for exit in model.exits:
        exit.register_forward_hook(lambda module, _, logits: F.dropout(logits, 0.5, module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = batches()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_conflicts(model, data)
    assert torch.equal(torch.rand(4), expected)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_exits_on_a_backbone_are_measured_too():
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(6 * 16, 3),
    )  # fmt: skip
    model = dfs_engine.attach_exits(backbone, at=["1"], example_input=torch.randn(1, 3, 8, 8))
    pairs = measure_conflicts(model, [(torch.randn(4, 3, 8, 8), torch.randint(3, (4,)))])
    assert {(pair.exit, pair.other) for pair in pairs} == {(1, 2)}
    assert any(pair.parameter.endswith("0.weight") and pair.kind == "disjoint" for pair in pairs)


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="one or more batches"):
        measure_conflicts(toy(), [])
    single = create_model("msdnet_cifar", num_exits=1, channels=4, growth=2)
    with pytest.raises(ValueError, match="two exits or more, whose gradients can be compared, got msdnet_cifar"):
        measure_conflicts(single, batches())
    with pytest.raises(ValueError, match="share trainable weights"):
        measure_conflicts(toy().requires_grad_(False), batches())
