"""Models and steps of several processes that are not alike in all of them."""

from dataclasses import dataclass

import torch
from capturing import loss_of
from distributing import outcome_of
from models import Net, mlp
from torch import distributed, nn

import rgd_ext

SIZES = 2, 5


def part_of(rank, width=6):
    """The part of a batch."""
    torch.manual_seed(99)
    return torch.randn(sum(SIZES), width, dtype=torch.float64).split(SIZES)[rank]


def seeded(build):
    """A model in float64."""
    torch.manual_seed(0)
    return build().double()


class WithCaches(nn.Module):
    """A linear layer, a buffer in its product, one of the size of the batch, and one that comes with the first call."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x):
        self.last = x.detach().sum(1)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(len(x)))
        return self.body(x) * self.scale


def with_caches(group, rank):
    """The gradients of two forwards and then two backwards, and the sizes of the buffers."""
    model = seeded(WithCaches)
    with rgd_ext.precondition(model, process_group=group, epsilon=0.1, verify=False):
        losses = [loss_of(model(part_of(rank))) for _ in range(2)]
        for loss in losses:
            loss.backward()
    return [p.grad for p in model.parameters()], [len(model.last), len(model.late)]


def assigned(group, rank, is_called):
    """The parameters after steps, before which all processes assign new parameters; one has no samples in the first."""
    model, x = seeded(mlp), part_of(rank)
    with rgd_ext.precondition(model, process_group=group, epsilon=0.1) as handle:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            if step == 1:
                model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
                model[0].bias.requires_grad_(False)  # the first that a call without samples would hang on
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            if step != 1 or rank == 0:
                loss_of(model(x)).backward()
            elif is_called:
                model(x[:0]).sum().backward()
            else:
                with handle.accumulate():
                    pass
            optimizer.step()
    return [p.detach() for p in model.parameters()]


def twins(group, rank):
    """The error of backwards of two equal models, which the second process runs in the other order."""
    models = [seeded(mlp), seeded(mlp)]
    handles = [rgd_ext.precondition(model, process_group=group) for model in models]
    try:
        for model in models if rank == 0 else models[::-1]:
            loss_of(model(part_of(rank))).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        for handle in handles:
            handle.remove()
    return None


def chained(group, rank, is_empty, of_own):
    """The gradients of two captured models, one behind the other, or the error.

    Args:
        group, rank: of the process.
        is_empty: whether the second process has no samples.
        of_own: whether the second model has a group of its own.
    """
    first, second = seeded(lambda: nn.Linear(6, 200)), seeded(lambda: nn.Linear(200, 200))
    ranks = distributed.get_process_group_ranks(group)
    other = distributed.new_group(ranks, use_local_synchronization=True) if of_own else group
    x = part_of(rank)[: 0 if is_empty and rank else None]
    with (
        rgd_ext.precondition(first, process_group=group, epsilon=0.1),
        rgd_ext.precondition(second, process_group=other, epsilon=0.1),
    ):
        for _ in range(2):
            first.zero_grad()
            second.zero_grad()
            try:
                (loss_of(second(first(x).tanh())) if len(x) else second(first(x)).sum()).backward()
            except RuntimeError as error:
                return str(error)
    return [p.grad for model in (first, second) for p in model.parameters()]


@dataclass
class Result:
    """What a model may return."""

    logits: torch.Tensor


def returning_a_dataclass(group, rank):
    """The gradients of the head alone, of a model that returns a dataclass; the second process has no samples."""
    net = seeded(lambda: Net(lambda m, x: Result(m.head(m.body(x).tanh())), body=nn.Linear(6, 4), head=nn.Linear(4, 2)))
    x = part_of(rank)[: 0 if rank else None]
    with rgd_ext.precondition(net, process_group=group, epsilon=0.1, verify=False):
        logits = net(x).logits
        (loss_of(logits) if len(x) else logits.sum()).backward(inputs=list(net.head.parameters()))
    return [p.grad for p in net.head.parameters()]


class WithScalar(nn.Module):
    """A linear layer, and a factor without dimensions."""

    def __init__(self):
        super().__init__()
        self.body, self.factor = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.body(x) * self.factor


def of_two_dtypes():
    """A model in float32 with a head in float64."""
    return Net(
        lambda m, x: m.head(m.body(x.float()).tanh().double()), body=nn.Linear(6, 4), head=nn.Linear(4, 2).double()
    )


BUILDS = {
    "scalar": lambda: WithScalar().double(),
    "two dtypes": of_two_dtypes,
}


def model_named(name):
    """One of `BUILDS`, with parameters of the same seed."""
    torch.manual_seed(0)
    return BUILDS[name]()


def outcome_of_build(group, rank, name, options):
    """The outcome of a backward."""
    model = model_named(name)
    with rgd_ext.precondition(model, process_group=group, **options) as handle:
        loss_of(model(part_of(rank))).backward()
        return outcome_of(model, handle)


def build_in_one(name, options):
    """The same in one process."""
    model = model_named(name)
    with rgd_ext.precondition(model, **options) as handle:
        with handle.accumulate():
            for rank in range(2):
                (loss_of(model(part_of(rank))) / 2).backward()
        return outcome_of(model, handle)


def own_scale():
    """A scale that differs between the processes."""
    return SIZES[distributed.get_rank()]


def with_scales_that_differ(group, rank):
    """The statistics of a policy whose scale differs between the processes."""
    model = seeded(mlp)
    epsilon = rgd_ext.Fixed(0.1, loss_scale=own_scale)
    with rgd_ext.precondition(model, process_group=group, epsilon=epsilon) as handle:
        loss_of(model(part_of(rank))).backward()
        return handle.stats.epsilon.item(), handle.stats.weights.tolist()


def with_frozen_that_changed(group, rank):
    """The error of a training in which one process has another frozen layer."""
    model = seeded(mlp)
    model[0].requires_grad_(False)
    with rgd_ext.precondition(model, process_group=group):
        if rank == 1:
            with torch.no_grad():
                model[0].weight.neg_()
        try:
            for _ in range(8):
                loss_of(model(part_of(rank))).backward()
        except RuntimeError as error:
            return str(error)
    return None


def with_vector_in_one(group, rank):
    """The error of a backward for which one process alone wants products with a vector."""
    model = seeded(mlp)
    with rgd_ext.observe(model, process_group=group) as handle:
        if rank == 0:
            handle.align(list(model.parameters()))
        try:
            loss_of(model(part_of(rank))).backward()
        except RuntimeError as error:
            return str(error)
    return None


def without_contributions(group, rank):
    """The number of samples of a backward in which one process has a gradient of no parameter."""
    model = seeded(
        lambda: Net(lambda m, x: m.b(x) if x[0, 0] > 0 else x + 0 * m.b(x).detach().sum(), b=nn.Linear(6, 6))
    )
    x = part_of(rank).abs() * (1 if rank == 0 else -1)
    x.requires_grad_()
    with rgd_ext.precondition(model, process_group=group, epsilon=0.1, verify=False) as handle:
        output = model(x)
        if rank == 0:
            loss_of(output).backward()
        else:
            with handle.accumulate():
                loss_of(output).backward()
        return handle.stats.batch_size


def record_of_nothing(group, rank, path):
    """One process records no sample."""
    model, x = seeded(mlp), part_of(rank)[: 0 if rank else None]
    with rgd_ext.observe(model, process_group=group) as handle:
        handle.record_to(path, 2)
        model(x).sum().backward()
        handle.record(list(range(len(x))))
    return handle.own_samples
