"""A program as users write it. The type checker reads it in strict mode, and a test runs it.

`assert_type` fails in the checker where an annotation of the package is missing or has become another one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import rgd_ext


class Scale(nn.Module):
    """A layer that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def scale_rule(module: Scale, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Tensor]:
    """The contributions of the samples to the gradient of the gain."""
    return {"gain": inputs[0] * output_grad}


def a_fifth(stats: rgd_ext.Statistics) -> Tensor:
    """A policy of the user's."""
    return 0.2 / stats.trace


def optimise(folder: Path) -> None:
    """Train a model, with a record of the statistics."""
    rgd_ext.register_rule(Scale, scale_rule)
    model = nn.Sequential(Scale(), nn.Linear(4, 3))
    rgd_ext.register_rule(model[1], rgd_ext.unit)
    rgd_ext.mark(model[0], batch_dim=0)
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, epsilon=rgd_ext.Spectral(0.5, every=2), inverse="weak-field")
    handle = optimizer.preconditioner
    assert_type(handle, rgd_ext.Preconditioner | None)
    assert handle is not None
    with rgd_ext.Monitor(handle, folder / "run.csv") as monitor:
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        monitor.log(loss)
    stats = handle.stats
    assert_type(stats, rgd_ext.Stats | None)
    assert stats is not None
    assert_type(stats.weights, Tensor)
    assert_type(stats.epsilon, Tensor | None)
    assert_type(stats.trace, Tensor)
    assert_type(stats.largest_eigenvalue, Tensor | None)
    optimizer.load_state_dict(optimizer.state_dict())


def agreeing(stats: rgd_ext.Statistics) -> Tensor:
    """A rule of the user's."""
    return (stats.alignments > 0) / stats.batch_size


def capture(folder: Path) -> None:
    """Use a capture without the optimizer of the package."""
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    with rgd_ext.observe(model, per_parameter=True) as observer:
        assert_type(observer, rgd_ext.Preconditioner)
        observer.align([torch.ones_like(p) for p in model.parameters()])
        model(x).square().mean().backward()
        assert observer.stats is not None
        assert_type(observer.stats.aligned, Tensor | None)
        assert_type(observer.stats.noise_scale, Tensor)
        assert observer.stats.per_parameter is not None
        assert_type(observer.stats.per_parameter["weight"].noise_scale, Tensor)
        assert_type(observer.stats.per_parameter.by_module().traces, Tensor)
        assert_type(observer.stats.to_dict(), dict[str, float | np.ndarray])
        observer.record_to(folder / "epoch.npy", size=100)
        observer.record(range(8))
    rules = agreeing, rgd_ext.weights.Clip(1.0), rgd_ext.weights.FromGramian(lambda gram: gram.mean(1))
    for rule in rules:
        with rgd_ext.precondition(model, weights=rule):
            model(x).square().mean().backward()
    with rgd_ext.precondition(model, epsilon=a_fifth, batch_norm="error") as handle:
        assert_type(handle, rgd_ext.Preconditioner)
        assert_type(rgd_ext.handle_of(model), rgd_ext.Preconditioner | None)
        assert_type(rgd_ext.verify(model, x), rgd_ext.Verification)
        optimizer = rgd_ext.RGD([{"params": model.parameters(), "lr": 0.2}], lr=0.1)
        with handle.accumulate():
            model(x).sum().backward()
        optimizer.step()
    assert_type(rgd_ext.convert_batch_norm(nn.BatchNorm1d(4)), nn.Module)


def analyse() -> None:
    """Compute with per-sample gradients that are there."""
    grads = torch.randn(8, 4)
    found, stats = rgd_ext.direction(grads, epsilon=rgd_ext.Rayleigh(0.5), inverse="exact")
    assert_type(found, list[Tensor])
    assert_type(stats, rgd_ext.Stats)
    matrix = rgd_ext.DiffusionMatrix([grads, torch.randn(8, 2, 3)], correction=1)
    assert_type(matrix @ torch.ones(10), Tensor)
    assert_type(matrix @ [torch.ones(4), torch.ones(2, 3)], list[Tensor])
    assert_type(matrix.spectrum(3), Tensor)
    assert_type(matrix.rank(), int)
    model, y = nn.Linear(4, 3), torch.randint(3, (8,))
    of_batch = rgd_ext.DiffusionMatrix.from_batch(model, nn.CrossEntropyLoss(), grads, y)
    of_data = rgd_ext.DiffusionMatrix.from_dataset(model.eval(), nn.CrossEntropyLoss(), [(grads, y)])
    assert_type(of_batch, rgd_ext.DiffusionMatrix)
    assert_type(of_data.trace(), Tensor)
    assert_type(rgd_ext.ops.moments(grads), tuple[list[Tensor], Tensor, Tensor])
    assert_type(rgd_ext.ops.gram([grads]), Tensor)


def losses(x: Tensor) -> Tensor:
    """Per-sample losses as a function of the parameters."""
    return (x - torch.eye(2, dtype=torch.float64)).square().sum(1)


def follow() -> None:
    """Compute the geometry at a point, and a flow."""
    x = torch.zeros(2)
    assert_type(rgd_ext.geometry.metric(losses, x, 0.1), Tensor)
    assert_type(rgd_ext.geometry.rgd_flow(losses, x, [0.0, 1.0], rgd_ext.Trace(0.5), rtol=1e-6), Tensor)


def fit() -> None:
    """Fit residuals."""
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "weight_decay": 1e-3}]
    optimizer = rgd_ext.GaussNewton(model, damping=1e-2, geodesic=True, params=groups, dtype=torch.float64)
    assert_type(optimizer.step(lambda: model(x)), Tensor)
    assert_type(optimizer.step(lambda: (model(x), model(x[:4])[:, 0])), Tensor)
    if optimizer.report is not None:
        assert_type(optimizer.report.gain_ratio, float | None)
