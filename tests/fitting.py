"""What the tests of Gauss-Newton steps have in common: the Jacobian, row by row by autograd, and steps by formulas."""

import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap


def rows(residuals):
    """All residuals: batch after batch, and in a batch one column after another."""
    batches = residuals if isinstance(residuals, tuple) else (residuals,)
    return torch.cat([column for batch in batches for column in (batch.unbind(1) if batch.ndim > 1 else [batch])])


def explicit(closure, parameters):
    """The residuals and their Jacobian, in float64, by one backward for each residual."""
    residuals = rows(closure())
    found = []
    for residual in residuals:
        grads = torch.autograd.grad(residual, parameters, retain_graph=True, allow_unused=True)
        found.append(torch.cat([torch.zeros(p.numel()).to(p) if g is None else g.to_dense().flatten()
                                for g, p in zip(grads, parameters, strict=True)]))  # fmt: skip
    return residuals.detach().double(), torch.stack(found).double()


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def levenberg_marquardt(closure, parameters, damping, lr=1.0):
    """The parameters after a step by the formula, x - lr J^T (J J^T + damping)^-1 r."""
    residuals, jacobian = explicit(closure, parameters)
    gram = jacobian @ jacobian.T + damping * torch.eye(len(residuals), dtype=torch.float64)
    return flat(parameters) - lr * (jacobian.T @ torch.linalg.solve(gram, residuals)).to(parameters[0].dtype)


def network(inputs=2, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, outputs)).double()


def points(number, dimensions=2):
    return torch.rand(number, dimensions, dtype=torch.float64)


# (network, points) -> residuals (B,) with derivatives with respect to the points, as people write them.
def by_hessian(u, x):
    return vmap(lambda z: torch.trace(hessian(lambda y: u(y)[0])(z)))(x) + x.sum(1)


def by_reverse_of_gradient(u, x):
    return vmap(lambda z: torch.trace(jacrev(grad(lambda y: u(y)[0]))(z)))(x) + x.sum(1)


def by_forward_of_gradient(u, x):
    return vmap(lambda z: torch.trace(jacfwd(grad(lambda y: u(y)[0]))(z)))(x)


def by_forward_twice(u, x):
    return vmap(lambda z: torch.trace(jacfwd(jacfwd(lambda y: u(y)[0]))(z)))(x)


def by_autograd(u, x):
    x = x.clone().requires_grad_()
    value = u(x)[:, 0]
    slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return sum(second) + value**2 + slope[:, 0]


DERIVATIVES = [by_hessian, by_reverse_of_gradient, by_forward_of_gradient, by_forward_twice, by_autograd]
