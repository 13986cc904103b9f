"""The independent oracle: explicit per-sample gradients, an explicit D, and training by them, in float64."""

import copy

import torch
from torch.func import functional_call, vjp

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def relative_error(value, expected):
    """Of all elements together, in float64."""
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_close(value, expected, dtype=None):
    """The relative error is within the tolerance of the dtype."""
    error = relative_error(value, expected)
    assert error < TOLERANCE[dtype or value.dtype], f"relative error {error:.2e}"


def flat(tensors):
    """All elements as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def flat_grad(model):
    """The gradients of all trainable parameters as one vector."""
    return flat(p.grad for p in model.parameters() if p.requires_grad)


def per_sample_gradients(model, loss, inputs):
    """G of shape (B, d): B times what sample i alone contributes to the gradient of loss(model(*inputs))."""
    model = copy.deepcopy(model).double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    output = model(*inputs).detach().requires_grad_()
    (output_grad,) = torch.autograd.grad(loss(output), output)
    rows = []
    for i in range(len(output)):
        sample = [x[i : i + 1] for x in inputs]
        _, pull = vjp(lambda p, sample=sample: functional_call(model, p, tuple(sample)), parameters)
        (contribution,) = pull(output_grad[i : i + 1].double())
        rows.append(flat(contribution.values()))
    return torch.stack(rows) * len(rows)


def diffusion_matrix(grads):
    """Eq. (2)."""
    centred = grads - grads.mean(0)
    return centred.T @ centred / len(grads)


def epsilon(grads, policy, fraction):
    """What the policy of that name chooses, from the explicit D."""
    mean, matrix = grads.mean(0), diffusion_matrix(grads)
    if policy == "Fixed":
        return fraction
    return {
        "Spectral": lambda: fraction / torch.linalg.eigvalsh(matrix)[-1],
        "Trace": lambda: fraction / matrix.trace(),
        "Rayleigh": lambda: fraction * mean.square().sum() / (mean @ matrix @ mean),
        "Ascent": lambda: -fraction / mean.norm(),
    }[policy]()


def direction(grads, policy="Spectral", fraction=0.5, inverse="weak-field"):
    """(I - eps D) g or (I + eps D)^-1 g with the explicit D."""
    mean, matrix = grads.mean(0), diffusion_matrix(grads)
    if not matrix.count_nonzero():
        return mean
    eps = epsilon(grads, policy, fraction)
    identity = torch.eye(len(mean), dtype=grads.dtype)
    if inverse == "exact":
        return torch.linalg.solve(identity + eps * matrix, mean)
    return (identity - eps * matrix) @ mean


def weak_field(grads, policy="Spectral", fraction=0.5):
    """The same as `direction` without forming D, for models too large for it."""
    mean = grads.mean(0)
    centred = grads - mean
    gram = centred @ centred.T / len(grads)
    product = centred.T @ (centred @ mean) / len(grads)
    eps = {
        "Spectral": lambda: fraction / torch.linalg.eigvalsh(gram)[-1],
        "Trace": lambda: fraction / gram.trace(),
        "Rayleigh": lambda: fraction * mean.square().sum() / (mean @ product),
        "Fixed": lambda: fraction,
    }[policy]()
    return mean - eps * product
