"""Criteria: their reduction is detected, and those that couple samples are refused."""

import pytest
import torch
import torch.nn.functional as F
from diffusing import batches, case, contrastive, explicit
from oracle import assert_close, diffusion_matrix
from torch import nn

from rgd_ext import DiffusionMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


REDUCTIONS = {"mean": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum")}

REDUCTIONS["none"] = nn.CrossEntropyLoss(reduction="none")

REDUCTIONS["weighted"] = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_reduction_is_found(name, size):
    model, _, x, y = case()
    loss = REDUCTIONS[name]
    rows = explicit(model, lambda o, t: loss(o, t).sum(), x, y)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, size)),
    ):
        assert_close(matrix.to_dense(), diffusion_matrix(rows))


COUPLED = {
    "weights": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "contrastive": contrastive,
    "contrastive, none": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o)), reduction="none"),
    "a spread": lambda o, y: o.square().sum() + o.mean(0).square().sum(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_not_per_sample_is_refused(name):
    model, _, x, _ = case()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    for matrix in (DiffusionMatrix.from_batch, lambda *a: DiffusionMatrix.from_dataset(*a[:2], batches(x, y, 4))):
        with pytest.raises(ValueError, match=r"not a per-sample loss.*'sum' or 'none'"):
            matrix(model, COUPLED[name], x, y).trace()


def test_an_ignored_target_in_a_later_batch_is_noticed():
    model, _, x, _ = case()
    y = torch.tensor([0, 2, 2, 0, 0, 1, 0])
    matrix = DiffusionMatrix.from_dataset(model, nn.CrossEntropyLoss(ignore_index=1), batches(x, y, 3))
    with pytest.raises(ValueError, match="not a per-sample loss"):
        matrix.trace()


def test_a_reduction_that_changes_is_noticed():
    model, _, x, y = case()
    loader = list(batches(x, y, 3))

    def loss(output, y):
        return F.cross_entropy(output, y, reduction="sum" if y is loader[1][1] else "mean")

    with pytest.raises(ValueError, match="not a per-sample loss"):
        DiffusionMatrix.from_dataset(model, loss, loader).trace()


def test_targets_and_inputs_in_nests():
    model = nn.Bilinear(3, 2, 1).double().eval()
    left, right, target = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(6, 1).double()
    names = ["low", "high"] * 3

    def loss(output, y):
        scale = torch.tensor([[2.0 if name == "high" else 1.0] for name in y["name"]])
        return (scale * (output - y["target"]).square()).mean()

    matrix = DiffusionMatrix.from_batch(model, loss, (left, right), {"target": target, "name": names})
    loader = [((left[i::2], right[i::2]), {"target": target[i::2], "name": names[i::2]}) for i in range(2)]
    assert_close(DiffusionMatrix.from_dataset(model, loss, loader).to_dense(), matrix.to_dense())
    by_name = DiffusionMatrix.from_batch(
        model, loss, {"input1": left, "input2": right}, {"target": target, "name": names}
    )
    assert torch.equal(by_name.to_dense(), matrix.to_dense())
