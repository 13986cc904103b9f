"""What the tests of several processes have in common: functions that run in each of them, and their oracle."""

import warnings
from typing import NamedTuple

import torch
from capturing import loss_of
from distributed_cases import UNEVEN, model_of, parts_of
from models import images
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rgd_ext
from rgd_ext.distributed import Group, buckets
from rgd_ext.distributed import group as group_module

# The sizes of the parts of a batch of two processes, whose Gramian is too large.
MANY = (2500, 2500)


class Outcome(NamedTuple):
    """What a backward leaves: the gradients, the statistics, and the buffers."""

    grads: list
    stats: dict | None
    buffers: list


def outcome_of(model, handle):
    """What the last backward has left."""
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    stats = None if handle.stats is None else handle.stats.to_dict()
    return Outcome(grads, stats, [b.clone() for b in model.buffers()])


def by_norm(gram):
    """Weights that fall with the norms of the gradients."""
    return gram.diagonal().rsqrt()


def capture_of(options):
    """How a model is captured: `observe` is an option of the tests."""
    options = dict(options)
    return (rgd_ext.observe if options.pop("observe", False) else rgd_ext.precondition), options


def in_each(group, rank, name, sizes, options, steps=1):
    """The outcome of the last of some backwards in each process, which starts from parameters of its own."""
    model, x = model_of(name, seed=rank), parts_of(name, sizes)[rank]
    capture, options = capture_of(options)
    with capture(model, process_group=group, **options) as handle:
        for _ in range(steps):
            model.zero_grad()
            loss_of(model(x)).backward()
        return outcome_of(model, handle)


def in_one(name, sizes, options):
    """The same in one process, which takes the parts one after another."""
    model, parts = model_of(name, seed=0), parts_of(name, sizes)
    capture, options = capture_of(options)
    with capture(model, **options) as handle:
        with handle.accumulate():
            for x in filter(len, parts):
                (loss_of(model(x)) / len(parts)).backward()
        return outcome_of(model, handle)


def after_training(group, rank, options, momentum):
    """The parameters after some steps of RGD, of a batch that differs from step to step, and its state."""
    model = model_of("MLP", seed=rank)
    optimizer = rgd_ext.RGD(model, lr=0.5, momentum=momentum, process_group=group, **options)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model(steps_of(step, group.size())[rank])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def steps_of(step, size):
    """The parts of the batch of a step, for `size` processes."""
    torch.manual_seed(step)
    return torch.randn(size * 3, 6, dtype=torch.float64).split(3)


def after_training_in_one(size, options, momentum):
    """The same in one process."""
    model = model_of("MLP", seed=0)
    optimizer = rgd_ext.RGD(model, lr=0.5, momentum=momentum, **options)
    for step in range(4):
        optimizer.zero_grad()
        with optimizer.preconditioner.accumulate():
            for x in steps_of(step, size):
                (loss_of(model(x)) / size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def micro_batches(group, rank, name, sizes, collect):
    """The outcome of a block of two backwards in each process, or of `defer`; the last process has but one."""
    model, x = model_of(name, seed=rank), parts_of(name, sizes)[rank]
    batches = [x] if rank == group.size() - 1 else [x[:1], x[1:]]

    def run():
        for batch in batches:
            (loss_of(model(batch)) * len(batch) / len(x)).backward()

    with rgd_ext.precondition(model, process_group=group) as handle:
        if collect == "block":
            with handle.accumulate():
                run()
        else:
            handle.defer()
            run()
            handle.write()
        return outcome_of(model, handle)


def uses_that_change(group, rank, times):
    """The outcomes of backwards through a model that uses a large layer so many times, each with its list of ranks."""
    model, x = model_of("large", seed=0), parts_of("large", UNEVEN[group.size()])[rank]
    found = []
    with rgd_ext.precondition(model, process_group=group) as handle:
        for of_ranks in times:
            model.zero_grad()
            model.times = of_ranks[rank]
            loss_of(model(x)).backward()
            found.append(outcome_of(model, handle))
    return found


def uses_in_one(sizes, times):
    """The same in one process."""
    model, parts, found = model_of("large", seed=0), parts_of("large", sizes), []
    with rgd_ext.precondition(model) as handle:
        for of_ranks in times:
            model.zero_grad()
            with handle.accumulate():
                for x, model.times in zip(parts, of_ranks, strict=True):
                    (loss_of(model(x)) / len(parts)).backward()
            found.append(outcome_of(model, handle))
    return found


def events_of(group, rank, options, bucket_bytes=buckets.BUCKET_BYTES):
    """What happens in the second backward of a model of large layers, in this order: sums, and gradients of inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(150, 150) for _ in range(4)))
    events, start_all_reduce, buckets.BUCKET_BYTES = [], Group.start_all_reduce, bucket_bytes

    def noted(self, what, buffer):
        events.append((what, buffer.numel()))
        return start_all_reduce(self, what, buffer)

    capture, options = capture_of(options)
    with capture(model, process_group=group, **options):
        for _ in range(2):
            events.clear()
            hidden = model[1](model[0](torch.randn(6, 150)))
            hidden.register_hook(lambda grad: events.append("backward of the first half"))
            Group.start_all_reduce = noted
            try:
                loss_of(model[3](model[2](hidden))).backward()
            finally:
                Group.start_all_reduce = start_all_reduce
    return events


def directions_of_each(name, sizes, options):
    """The mean of the directions that single processes write for their own parts, one after another."""
    grads = []
    for x in parts_of(name, sizes):
        model = model_of(name, seed=0)
        if len(x):
            with rgd_ext.precondition(model, **options):
                loss_of(model(x)).backward()
            grads.append([p.grad for p in model.parameters()])
        else:
            grads.append([torch.zeros_like(p) for p in model.parameters()])
    return [torch.stack(each).mean(0) for each in zip(*grads, strict=True)]


def in_low_precision(group, rank, dtype, autocast):
    """The gradients of a backward of a large model in another dtype, or under autocast."""
    model = model_of("large", seed=rank, dtype=dtype)
    x = parts_of("large", UNEVEN[group.size()])[rank].to(dtype)
    with rgd_ext.precondition(model, process_group=group, epsilon=rgd_ext.Rayleigh(0.5)) as handle:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_of(model(x).float())
        loss.backward()
        return outcome_of(model, handle)


def with_scaler(group, rank, bad_rank):
    """Whether the parameters moved in each of two steps under a gradient scaler, the first with inf in a process."""
    model, x = model_of("MLP", seed=rank, dtype=torch.float32), torch.randn(3, 6)
    optimizer = rgd_ext.RGD(model, lr=0.1, process_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved = []
    for bad in (bad_rank, None):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x)) * (torch.inf if rank == bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not all(map(torch.equal, before, model.parameters())))
    return moved


def random_weights(stats):
    """Weights that no other process draws."""
    return torch.rand_like(stats.alignments) / stats.batch_size


def of_random_rule(group, rank):
    """The outcome of a backward with weights that each process draws from a state of its own."""
    model, x = model_of("MLP", seed=0), parts_of("MLP", UNEVEN[group.size()])[rank]
    torch.manual_seed(rank)
    with rgd_ext.precondition(model, process_group=group, weights=random_weights) as handle:
        loss_of(model(x)).backward()
        return outcome_of(model, handle)


def records_of(group, rank, path):
    """Each process records its samples in one file; returns their places in the statistics, and these."""
    sizes = UNEVEN[group.size()]
    model, x = model_of("MLP", seed=0), parts_of("MLP", sizes)[rank]
    index = torch.arange(sum(sizes)).split(sizes)[rank]
    with rgd_ext.observe(model, process_group=group) as handle:
        handle.align([torch.ones_like(p) for p in model.parameters()])
        handle.record_to(path, sum(sizes))
        loss_of(model(x)).backward()
        handle.record(index)
        return handle.own_samples, handle.stats.to_dict()


def items_of(group, rank, name, sizes, gram=False):
    """The statistics of each parameter."""
    model, x = model_of(name, seed=rank), parts_of(name, sizes)[rank]
    with rgd_ext.observe(model, process_group=group, per_parameter=True, gram=gram) as handle:
        loss_of(model(x)).backward()
        return handle.stats.per_parameter.to_dict()


def items_in_one(name, sizes):
    """The same in one process."""
    model, parts = model_of(name, seed=0), parts_of(name, sizes)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        with handle.accumulate():
            for x in filter(len, parts):
                (loss_of(model(x)) / len(parts)).backward()
        return handle.stats.per_parameter.to_dict()


def buffers_of(group, rank):
    """The buffers of a model with batch normalisation after two backwards, of batches of this rank."""
    model = model_of("batch norm", seed=rank)
    with rgd_ext.precondition(model, process_group=group, batch_norm="contribution"):
        for step in range(2):
            loss_of(model(images_of(rank, step))).backward()
    return [b.clone() for b in model.buffers()]


def buffers_in_one():
    """The same in one process, with the batches of rank 0."""
    model = model_of("batch norm", seed=0)
    for step in range(2):
        model(images_of(0, step))
    return [*model.buffers()]


def images_of(rank, step):
    """A batch that no other rank and step has."""
    torch.manual_seed(10 * step + rank)
    return images(3)[0].double()


def one_process_alone(group, rank):
    """A forward that only the first process runs, and a backward of both, where the second has no samples to call."""
    model = model_of("batch norm", seed=rank)
    with rgd_ext.precondition(model, process_group=group, batch_norm="contribution") as handle:
        if rank == 0:
            model(images_of(0, 0))
            loss_of(model(images_of(0, 1))).backward()
        else:
            with handle.accumulate():
                pass
        return outcome_of(model, handle)


def in_each_wrapped(group, rank, name, sizes, steps):
    """The outcome of a backward through a DistributedDataParallel that is handed in."""
    wrapped, x = DistributedDataParallel(model_of(name, seed=rank), process_group=group), parts_of(name, sizes)[rank]
    with rgd_ext.precondition(wrapped) as handle:
        for _ in range(steps):
            wrapped.zero_grad()
            loss_of(wrapped(x)).backward()
        return outcome_of(wrapped.module, handle)


def with_group_of_hosts(group, rank, name, sizes):
    """The outcome of a backward where numbers have a group of their own, as with NCCL."""
    serves_hosts, group_module._serves_hosts = group_module._serves_hosts, lambda group: False
    try:
        return in_each(group, rank, name, sizes, {}, 2)
    finally:
        group_module._serves_hosts = serves_hosts


def with_many_samples(group, rank, options):
    """The error of a backward with more samples than a Gramian may have, None without one, and what it leaves."""
    model, x = model_of("MLP", seed=0), parts_of("MLP", MANY)[rank]
    with rgd_ext.precondition(model, process_group=group, **options) as handle:
        try:
            loss_of(model(x)).backward()
        except ValueError as error:
            return str(error), outcome_of(model, handle)
        return None, outcome_of(model, handle)


def with_agreeing_samples(group, rank, parts):
    """The direction of given per-sample gradients: the inputs of a linear model."""
    model = nn.Linear(len(parts[0][0]), 1, bias=False)
    with rgd_ext.precondition(model, process_group=group, verify=False):
        model(parts[rank]).mean().backward()
    return model.weight.grad[0]


def on_mesh(group, rank, name, sizes):
    """The outcome of a backward with a mesh in the place of a group."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1, group.size()), mesh_dim_names=("a", "b"))
    return in_each(mesh["b"], rank, name, sizes, {})


def captures_of_bad_groups(group, rank):
    """The errors of captures with what is no group, or not the group of this process."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    bad = {"string": "gloo", "number": 3, "mesh": mesh, "outside": distributed.GroupMember.NON_GROUP_MEMBER}
    return {name: error_of(lambda each=each: Group(each)) for name, each in bad.items()}


def error_of(call):
    """The type and the text of the error that a call raises."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def after_uneven_epochs(group, rank):
    """The parameters after a training in which the second process has one batch less, and makes up for it."""
    model = model_of("MLP", seed=rank)
    optimizer = rgd_ext.RGD(model, lr=0.5, momentum=0.9, process_group=group)
    for step in range(3):
        optimizer.zero_grad()
        if rank == 1 and step == 2:
            with optimizer.preconditioner.accumulate():
                pass
        else:
            loss_of(model(steps_of(step, group.size())[rank])).backward()
        optimizer.step()
    with optimizer.preconditioner.accumulate():
        pass
    return [p.detach().clone() for p in model.parameters()], optimizer.preconditioner.stats is None


def wrapped_with_buffers(group, rank, broadcast_buffers):
    """The buffers after a step through a wrapper, whose forward rank 1 alone has run in eval mode before."""
    model = model_of("batch norm", seed=rank)
    wrapped = DistributedDataParallel(model, process_group=group, broadcast_buffers=broadcast_buffers)
    optimizer = rgd_ext.RGD(wrapped, lr=0.1, batch_norm="contribution")
    if rank == 1:
        wrapped.eval()(images_of(1, 0))
        wrapped.train()
    loss_of(wrapped(images_of(rank, 0))).backward()
    optimizer.step()
    return [b.clone() for b in model.buffers()], [p.detach().clone() for p in model.parameters()]


def warnings_of_captures(group, rank):
    """The warnings of a capture without a group, and of one with it."""
    found = []
    for options in ({}, {"process_group": group}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rgd_ext.observe(nn.Linear(2, 1), **options)
        found.append([str(warning.message) for warning in caught])
    return found
