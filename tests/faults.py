"""What goes wrong in one of several processes, for the tests of what the others do then."""

import datetime
import os
import signal
import time

import torch
from capturing import loss_of
from distributed_cases import model_of, parts_of
from distributing import Outcome, outcome_of
from sharding import children, local, mesh_of
from torch import distributed, nn

import rgd_ext

# Of the groups in which a process waits for another, in seconds.
PATIENCE = 10


def die():
    """End this process as a machine does that loses its power."""
    os.kill(os.getpid(), signal.SIGKILL)


class DyingForward(nn.Module):
    """The identity, in whose forward or backward the process ends."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        if self.where == "forward":
            die()
        if self.where == "backward" and x.requires_grad:
            x.register_hook(lambda grad: die())
        return x


def with_death(group, rank, where, is_sharded):
    """The error of a backward, in whose forward, backward or policy the last process ends, and what it leaves."""
    model, x = model_of("MLP", seed=rank), torch.randn(3, 6).double()
    if is_sharded:
        children(model, mesh=mesh_of(group))
    is_last = rank == group.size() - 1
    with rgd_ext.precondition(model, process_group=group, epsilon=own_policy, verify=False):
        before = [local(p).clone() for p in model.parameters()]
        own_policy.dies = is_last and where == "policy"
        try:
            out = model(x)
            if is_last and where != "policy":
                out = DyingForward(where)(out)
            loss_of(out).backward()
        except RuntimeError as error:
            same = all(torch.equal(value, local(p)) for value, p in zip(before, model.parameters(), strict=True))
            return str(error), same, all(p.grad is None for p in model.parameters())
    return None


class _Policy:
    """A constant epsilon, in whose choice the process may end."""

    dies = False

    def __call__(self, stats):
        if self.dies:
            die()
        return 0.1

    def __repr__(self):
        return "a policy"


own_policy = _Policy()


def impatient(group):
    """Another group of the same processes, which waits for `PATIENCE` seconds."""
    ranks = distributed.get_process_group_ranks(group)
    return distributed.new_group(ranks, timeout=datetime.timedelta(seconds=PATIENCE))


def with_error_in_loss(group, rank):
    """The seconds that the first process waits for the second, whose loss raises, and its error."""
    model, x = model_of("MLP", seed=rank), torch.randn(3, 6).double()
    with rgd_ext.precondition(model, process_group=impatient(group)) as handle:
        out = model(x)
        if rank == 1:
            return None
        start = time.perf_counter()
        try:
            loss_of(out).backward()
        except RuntimeError as error:
            return time.perf_counter() - start, str(error), outcome_of(model, handle)
    return None


def with_skipped_backward(group, rank, zeroes):
    """The errors of a training in which the second process skips a backward, and the parameters at the end.

    Args:
        group, rank: of the process.
        zeroes: whether it sets the gradient to None in the step that lacks a backward.
    """
    model = model_of("MLP", seed=rank)
    optimizer = rgd_ext.RGD(model, lr=0.1, process_group=impatient(group))
    try:
        for step in range(3):
            skips = rank == 1 and step == 1
            if zeroes or not skips:
                optimizer.zero_grad()
            if not skips:
                loss_of(model(parts_of("MLP", (3, 3))[rank])).backward()
            optimizer.step()
    except RuntimeError as error:
        return str(error), [p.detach() for p in model.parameters()]
    return None, [p.detach() for p in model.parameters()]


CAPTURES = {
    "the parameters": lambda rank: (nn.Linear(6, 3 + rank), {}),
    "the parameters, one more": lambda rank: (nn.Sequential(*(nn.Linear(6, 6) for _ in range(1 + rank))), {}),
    "the rule": lambda rank: (nn.Linear(6, 3), {"epsilon": (0.1, rgd_ext.Trace(0.5))[rank]}),
    "the rule, its fraction": lambda rank: (nn.Linear(6, 3), {"epsilon": rgd_ext.Trace((0.5, 0.4)[rank])}),
    "the modules": lambda rank: (nn.Sequential(nn.Linear(6, 3), (nn.Tanh(), nn.ReLU())[rank]), {}),
    "mode": lambda rank: (nn.Linear(6, 3), {"mode": ("exact", "local")[rank]}),
    "batch_dim": lambda rank: (nn.Linear(6, 3), {"batch_dim": rank}),
    "the buffers": lambda rank: (nn.Sequential(nn.Linear(6, 3), *[nn.BatchNorm1d(3, affine=False).eval()] * rank), {}),
}


def differing_captures(group, rank, name):
    """The error of a capture that the two processes make in different ways; the model is as it was afterwards."""
    torch.manual_seed(rank)
    model, options = CAPTURES[name](rank)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        rgd_ext.precondition(model, process_group=group, **options)
    except ValueError as error:
        same = all(map(torch.equal, before, model.parameters()))
        return str(error), same and rgd_ext.handle_of(model) is None
    return None


def with_changed_parameter(group, rank):
    """The error of a backward after one process has changed a parameter, which may be another one than is compared."""
    model, x = model_of("MLP", seed=rank), torch.randn(3, 6).double()
    with rgd_ext.precondition(model, process_group=group) as handle:
        if rank == 1:
            with torch.no_grad():
                model[2].bias[0] += 1e-12
        for step in range(len(list(model.parameters()))):
            model.zero_grad()
            try:
                loss_of(model(x)).backward()
            except RuntimeError as error:
                return step, str(error), outcome_of(model, handle)
    return None


def leaves_nothing(outcome: Outcome):
    """Whether there is no gradient."""
    return all(g is None for g in outcome.grads)
