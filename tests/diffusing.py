"""What the tests of the diffusion matrix have in common: models, losses and data, and the explicit matrix."""

import copy

import torch
import torch.nn.functional as F
from models import GPT, MODELS, mlp, resnet
from oracle import assert_close, diffusion_matrix, flat
from torch.func import functional_call, grad
from torch.utils.data import DataLoader, TensorDataset


def token_loss(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def contrastive(output, y):
    """A loss that couples the samples."""
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


# Model, inputs, number of classes, loss.
CASES = {
    "MLP": (mlp, MODELS["MLP"][1], lambda b: torch.randint(3, (b,)), F.cross_entropy),
    "CNN": (resnet, MODELS["ResNet"][1], lambda b: torch.randint(3, (b,)), F.cross_entropy),
    "GPT": (lambda: GPT(6, 4, 8), lambda b: [torch.randint(6, (b, 8))], lambda b: torch.randint(6, (b, 8)), token_loss),
}


def case(name="MLP", size=7, dtype=torch.float64):
    build, inputs, targets, loss = CASES[name]
    (x,) = inputs(size)
    x = x.to(dtype) if x.is_floating_point() else x
    return build().to(dtype).eval(), loss, x, targets(size)


def explicit(model, loss, x, y):
    """G, (B, d): one gradient at a time."""
    model = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = x.double() if x.is_floating_point() else x

    def f(p, i):
        return loss(functional_call(model, p, (x[i : i + 1],)), y[i : i + 1])

    return torch.stack([flat(grad(f)(parameters, i).values()) for i in range(len(x))])


def batches(x, y, size):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def check(matrix, rows, dtype=torch.float64):
    """Every method against the explicit D of `rows`."""
    expected, n = diffusion_matrix(rows), len(rows)
    values = torch.linalg.svdvals(rows - rows.mean(0)).square() / n
    vector, several = torch.randn(len(expected), dtype=dtype), torch.randn(len(expected), 3, dtype=dtype)
    assert matrix.num_samples == n
    assert matrix.shape == expected.shape
    assert_close(matrix @ vector, expected @ vector.double(), dtype)
    assert_close(matrix @ several, expected @ several.double(), dtype)
    assert_close(matrix.quadratic_form(vector), vector.double() @ expected @ vector.double(), dtype)
    assert_close(matrix.quadratic_form(several), (several.double() * (expected @ several.double())).sum(0), dtype)
    assert_close(matrix.trace(), expected.trace(), dtype)
    assert_close(matrix.to_dense(), expected, dtype)
    assert_close(matrix.largest_eigenvalue(), values[0], dtype)
    assert_close(matrix.spectrum(), values[: min(n - 1, len(values))], dtype)
    assert matrix.rank() == torch.linalg.matrix_rank(rows - rows.mean(0))


class Counting:
    """A loader that counts its passes, and may fail once at a given batch."""

    def __init__(self, loader, fail_at=None):
        self.loader, self.fail_at = loader, fail_at
        self.passes = self.given = 0

    def __iter__(self):
        self.passes += 1
        for batch in self.loader:
            if self.given == self.fail_at:
                raise KeyboardInterrupt
            self.given += 1
            yield batch

    def __len__(self):
        return len(self.loader)
