"""A physics-informed network: the Poisson equation on the unit square, by Gauss-Newton steps and by Adam.

The network u(x, y) is to satisfy u_xx + u_yy = -f inside of the square and u = 0 on its border, where f is chosen so
that the solution is sin(pi x) sin(pi y). Two sets of residuals are minimised together: those of the equation at points
inside, and those of the border at points there.
"""

import argparse
import time

import torch
from torch.func import hessian, vmap

import rgd_ext

INSIDE, BORDER = 200, 80
BORDER_WEIGHT = 10  # of the residuals of the border, so that they count beside those of second derivatives


def solution(x: torch.Tensor) -> torch.Tensor:
    """The solution at points (N, 2), shape (N,)."""
    return torch.sin(torch.pi * x).prod(1)


class Problem:
    """A network and the points where its residuals are taken."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1))
        self.inside, self.border = torch.rand(INSIDE, 2), torch.rand(BORDER, 2)
        side = torch.arange(BORDER) % 4
        self.border[torch.arange(BORDER), side // 2] = (side % 2).to(self.border)

    def residuals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the equation, (INSIDE,), and of the border, (BORDER,): the sum of squares is one of weighted means."""
        laplacian = vmap(lambda z: torch.trace(hessian(lambda y: self.net(y)[0])(z)))(self.inside)
        equation = laplacian + 2 * torch.pi**2 * solution(self.inside)
        return equation / INSIDE**0.5, BORDER_WEIGHT * self.net(self.border)[:, 0] / BORDER**0.5

    def error(self) -> float:
        """The root mean square of the difference from the solution, at fresh points."""
        x = torch.rand(1000, 2, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return (self.net(x)[:, 0] - solution(x)).square().mean().sqrt().item()


def by_gauss_newton(problem: Problem, steps: int) -> None:
    """Fit the network by Levenberg-Marquardt steps with geodesic acceleration."""
    optimizer = rgd_ext.GaussNewton(problem.net, geodesic=True)
    for _ in range(steps):
        optimizer.step(problem.residuals)  # the residuals, not a loss, and no backward


def by_adam(problem: Problem, steps: int) -> None:
    """Fit the network by Adam, with a rate that decays to zero."""
    optimizer = torch.optim.Adam(problem.net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(r.square().sum() for r in problem.residuals()).backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of Gauss-Newton; Adam takes 25 times as many")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the tensors are too small for a second one
    torch.set_default_dtype(torch.float64)
    print(f"{'method':<14}{'steps':>7}{'seconds':>9}{'loss':>12}{'error':>10}")
    for name, fit, number in (("Gauss-Newton", by_gauss_newton, steps), ("Adam", by_adam, 25 * steps)):
        problem, begin = Problem(seed=0), time.perf_counter()
        fit(problem, number)
        seconds = time.perf_counter() - begin
        squared = sum(r.square().sum() for r in problem.residuals()).item()
        print(f"{name:<14}{number:>7}{seconds:>9.1f}{squared:>12.1e}{problem.error():>10.1e}")
