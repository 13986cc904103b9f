"""The flows that are compared with SGD, many in one integration, which takes far less time than one by one.

`rgd_ext.geometry` has the gradient flow and that of eq. (10) too, one at a time and with more checks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.func import grad, vmap

from .problems import Problem

# The errors of the flows are below 1e-5 of their lengths, far below their distances from SGD.
TOLERANCES = {"method": "DOP853", "rtol": 1e-7, "atol": 1e-9}

# The velocities at the positions of all flows, (flows, d).
Velocity = Callable[[Tensor], Tensor]


@torch.no_grad()
def integrate(velocity: Velocity, x0: Tensor, flows: int, times: Tensor) -> Tensor:
    """The solutions of dx/dt = velocity(x) from x0 (d,) at time 0, at `times` (T,); (flows, T, d).

    Raises:
        RuntimeError: if the integration fails.
    """

    def derivative(_: float, flat: object) -> object:
        return velocity(torch.as_tensor(flat).view(flows, -1)).flatten().numpy()

    start = x0.repeat(flows).numpy()
    solution = solve_ivp(derivative, (0.0, times[-1].item()), start, t_eval=times.numpy(), **TOLERANCES)
    if not solution.success:
        raise RuntimeError(f"the integration failed after {len(solution.t)} of {len(times)} times: {solution.message}")
    return torch.as_tensor(solution.y).view(flows, len(x0), -1).mT.contiguous()


def per_sample_gradients(problem: Problem, x: Tensor) -> Tensor:
    """g_i at x (d,); (N, d)."""
    return vmap(grad(problem.loss), (None,) + (0,) * len(problem.samples))(x, *problem.samples)


def centred_gradients(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """g and g_i - g at x (flows, d); (flows, d) and (flows, N, d)."""
    gradients = vmap(lambda x: per_sample_gradients(problem, x))(x)
    return gradients.mean(1), gradients - gradients.mean(1, keepdim=True)


def largest_eigenvalue(centred: Tensor) -> Tensor:
    """lambda_max(D) from g_i - g (flows, N, d); (flows,)."""
    samples, parameters = centred.shape[1:]
    gramian = centred @ centred.mT if samples < parameters else centred.mT @ centred
    return torch.linalg.eigvalsh(gramian)[:, -1] / samples


class Relativistic:
    """The velocities -s (I - eps D) g of eq. (10), with another epsilon and another speed s in each flow.

    A flow stops where |eps| lambda_max(D(x)) reaches 1, as I - eps D or the metric I + eps D is singular there.

    Args:
        problem: whose D and g are meant.
        fractions: c of the flows, (flows,).
        constant: whether eps is c / lambda_max(D(x0)) all along, or c / lambda_max(D(x)); (flows,).
        speeds: s of the flows, (flows,).

    Attributes:
        stopped: which flows left the bounds of eq. (6) so far, (flows,).
    """

    def __init__(self, problem: Problem, fractions: Tensor, constant: Tensor, speeds: Tensor) -> None:
        self.problem, self.fractions, self.constant, self.speeds = problem, fractions, constant, speeds
        self.largest_at_start = largest_eigenvalue(centred_gradients(problem, problem.x0[None])[1])
        self.stopped = torch.zeros(len(fractions), dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        g, centred = centred_gradients(self.problem, x)
        largest = largest_eigenvalue(centred)
        epsilon = self.fractions / torch.where(self.constant, self.largest_at_start, largest)
        self.stopped |= (epsilon * largest).abs() >= 1
        change = (centred.mT @ (centred @ g[..., None]))[..., 0] / self.problem.size  # D g
        return self.speeds[:, None] * torch.where(self.stopped[:, None], 0.0, epsilon[:, None] * change - g)


def modified(problem: Problem, lr: Tensor, share: Tensor) -> Velocity:
    """The velocities -grad (f + (lr / 4) (|g|^2 + share tr D)), with other numbers in each flow, (flows,).

    With share = 0 that is the modified flow of gradient descent (D. Barrett and B. Dherin, 2021, arXiv 2009.11162),
    -(g + (lr / 2) H g). With (N - B) / ((N - 1) B) it is that of SGD in shuffled epochs (S. Smith et al., 2021, arXiv
    2101.12176), f + (lr / 4) E |grad f_B|^2, as D has the divisor N.
    """

    def loss(x: Tensor, lr: Tensor, share: Tensor) -> Tensor:
        gradients = per_sample_gradients(problem, x)
        square, mean_square = gradients.mean(0).square().sum(), gradients.square().sum(1).mean()
        return problem.mean(x) + lr / 4 * (square + share * (mean_square - square))

    return lambda x: -vmap(grad(loss))(x, lr, share)
