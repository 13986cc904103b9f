"""What the tests of sharded models have in common: functions that run in each process."""

import importlib
import tempfile
import time
import weakref
from collections import Counter
from unittest import mock

import torch
from capturing import loss_of
from distributed_cases import model_of, parts_of
from distributing import Outcome, capture_of, steps_of
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import rgd_ext
from rgd_ext.distributed import Group
from rgd_ext.distributed.buckets import Layout
from rgd_ext.distributed.mean import MeanExchange
from rgd_ext.distributed.sharded_layout import ShardedLayout


def root(model, **options):
    """All parameters in one group."""
    fully_shard(model, **options)


def children(model, **options):
    """A group for each part of the model, and one for the rest."""
    without_root(model, **options)
    fully_shard(model, **options)


def without_root(model, **options):
    """A group for each part of the model, whose last one is not sharded."""
    parts = [child for child in model.children() if any(True for _ in child.parameters())]
    for child in parts[:-1]:
        if not isinstance(child, nn.ModuleList):
            fully_shard(child, **options)


def blocks(model, **options):
    """A group for each block of a transformer, and one for the rest, as people shard them."""
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def last_dim(parameter):
    """Where weights are cut along their last dimension."""
    return Shard(parameter.ndim - 1) if parameter.shape[-1] % 2 == 0 else None


WAYS = {way.__name__: way for way in (root, children, without_root, blocks)}
POLICIES = {
    "float32": {},
    "kept": {"reshard_after_forward": False},
    "resharded": {"reshard_after_forward": True},
    "resharded to two": {"reshard_after_forward": 2},
    "last dim": {"shard_placement_fn": last_dim},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}


def whole(tensor):
    """All of a tensor of which each process has a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This process's shard of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def outcome_of(model, handle):
    """What the last backward has left, put together."""
    stepped = [*model.parameters()]
    for parameter in stepped:
        grad = parameter.grad
        assert grad is None or type(grad) is type(parameter.data), (type(grad), type(parameter))
        assert not isinstance(grad, DTensor) or grad.placements == parameter.placements
    grads = [None if p.grad is None else whole(p.grad).clone() for p in stepped]
    stats = None if handle.stats is None else handle.stats.to_dict()
    return Outcome(grads, stats, [b.clone() for b in model.buffers()])


def mesh_of(group):
    """The mesh of a group that there is already: only all processes together could make another one."""
    return DeviceMesh.from_group(group, "cpu")


def sharded_model(name, way, mesh, policy="float32", dtype=torch.float64):
    """A model of which each process has shards."""
    model = model_of(name, seed=0, dtype=dtype)
    WAYS[way](model, mesh=mesh, **POLICIES[policy])
    return model


def in_each(group, rank, name, way, policy, sizes, options, steps=2, dtype=torch.float64):
    """The outcome of the last of some backwards in each process."""
    mesh = mesh_of(group)
    model, x = sharded_model(name, way, mesh, policy, dtype), parts_of(name, sizes, dtype)[rank]
    capture, options = capture_of(options)
    with capture(model, process_group=mesh, verify=False, **options) as handle:
        for _ in range(steps):
            model.zero_grad()
            loss_of(model(x)).backward()
        return outcome_of(model, handle)


def in_each_on_mesh(group, rank, name, way, shape, sizes, options):
    """The same on a mesh of two dimensions, along the first of which shards are replicated."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    model, x = sharded_model(name, way, mesh), parts_of(name, sizes)[rank]
    if rank >= shape[1]:
        with torch.no_grad():
            model.get_parameter("0.weight").to_local().add_(1.0)  # as if each process had its own seed
    with rgd_ext.precondition(model, process_group=group, verify=False, **options) as handle:
        loss_of(model(x)).backward()
        return outcome_of(model, handle)


def replicated(group, rank, sizes):
    """The outcome of a model whose parameters are replicated, as DTensors."""
    module = importlib.import_module("torch.distributed._composable.replicate_with_fsdp")
    model, x = model_of("MLP", seed=rank), parts_of("MLP", sizes)[rank]
    module.replicate(model, mesh=mesh_of(group))
    with rgd_ext.precondition(model, process_group=group, verify=False, epsilon=rgd_ext.Rayleigh(0.5)) as handle:
        loss_of(model(x)).backward()
        return outcome_of(model, handle)


def with_norm_of_its_own(group, rank, sizes):
    """The outcome of a model whose layers with buffers are passed to `fully_shard` themselves."""
    mesh = mesh_of(group)
    model, x = model_of("batch norm", seed=0), parts_of("batch norm", sizes)[rank]
    children(model, mesh=mesh)
    options = {"process_group": group, "verify": False, "batch_norm": "contribution"}
    with rgd_ext.precondition(model, **options) as handle:
        loss_of(model(x)).backward()
        return outcome_of(model, handle)


def with_drifting_replica(group, rank):
    """The error of a backward after the second replica has changed a parameter."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model, x = sharded_model("MLP", "children", mesh), parts_of("MLP", (3,) * 4)[rank]

    def steps():
        for _ in range(len([*model.parameters()])):
            loss_of(model(x)).backward()

    with rgd_ext.precondition(model, process_group=group, verify=False):
        with torch.no_grad():
            local(model.get_parameter("2.bias")).add_(1e-12 * (rank >= 2))
        return error_of(steps)


def with_step_left_out(group, rank):
    """The error of a training in which the second process leaves out a step of the optimizer."""
    model, x = sharded_model("MLP", "children", mesh_of(group)), parts_of("MLP", (3, 3))[rank]
    optimizer = rgd_ext.RGD(model, lr=0.1, process_group=group, verify=False)

    def steps():
        for step in range(1 + len([*model.parameters()])):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            if step or not rank:
                optimizer.step()

    return error_of(steps)


def with_differing_vectors(group, rank):
    """The error of a backward with vectors of which one process alone has shards."""
    model, x = sharded_model("MLP", "children", mesh_of(group)), parts_of("MLP", (3, 3))[rank]
    with rgd_ext.precondition(model, process_group=group, verify=False) as handle:
        vectors = [p.detach() for p in model.parameters()]
        wholes = [v.full_tensor() for v in vectors]
        handle.align(wholes if rank else vectors)
        return error_of(lambda: loss_of(model(x)).backward())


def with_whole_parameters(group, rank, sizes):
    """The outcome where one parameter stays whole, and another one is frozen."""
    mesh = mesh_of(group)
    model, x = model_of("frozen", seed=rank), parts_of("frozen", sizes)[rank]
    fully_shard(model, mesh=mesh, ignored_params={model[4].weight})
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), model_of("frozen", seed=0).parameters(), strict=True):
            if isinstance(parameter, DTensor):
                parameter.copy_(torch.distributed.tensor.distribute_tensor(value, mesh))
    with rgd_ext.precondition(model, process_group=group, verify=False) as handle:
        loss_of(model(x)).backward()
        return outcome_of(model, handle)


def micro_batches(group, rank, collect, sizes):
    """The outcome of two backwards in each process, which are collected."""
    model, x = sharded_model("MLP", "children", mesh_of(group)), parts_of("MLP", sizes)[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def run():
        for part in (x[:1], x[1:]):
            (loss_of(model(part)) * len(part) / len(x)).backward()

    with rgd_ext.precondition(model, process_group=group, verify=False) as handle:
        if collect == "block":
            with handle.accumulate():
                run()
        else:
            handle.defer()
            run()
            refused = error_of(optimizer.step)
            assert "handle.write() before the step" in refused, refused
            handle.write()
        return outcome_of(model, handle)


def with_scaler(group, rank, bad_rank):
    """Whether the parameters moved in each of two steps under a gradient scaler, the first with inf in a process."""
    model, x = sharded_model("MLP", "children", mesh_of(group), dtype=torch.float32), torch.randn(3, 6)
    optimizer = rgd_ext.RGD(model, lr=0.1, process_group=group, verify=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved = []
    for bad in (bad_rank, None):
        before = [whole(p).detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x)) * (torch.inf if rank == bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not all(map(torch.equal, before, [whole(p) for p in model.parameters()])))
    return moved


def with_tiny_second_gradient(group, rank):
    """The gradient and its norm where the parts of the processes have a sum that bfloat16 would round to the first."""
    model = nn.Linear(8, 8, bias=False)
    fully_shard(model, mesh=mesh_of(group), **POLICIES["bfloat16"])
    x = torch.full((1, 8), 2.0**-9 if rank else 1.0)
    with rgd_ext.precondition(model, process_group=group, verify=False, epsilon=0.0) as handle:
        model(x).sum().backward()
        return whole(model.weight.grad), handle.stats.grad_norm


def error_of(call, *args, **options):
    """The text of the error that a call raises, with its type in front; None without one."""
    try:
        call(*args, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def items_of(group, rank, name, way, sizes, gram):
    """The statistics of each parameter, and products with a vector of which each process has shards."""
    model, x = sharded_model(name, way, mesh_of(group)), parts_of(name, sizes)[rank]
    with rgd_ext.observe(model, process_group=group, per_parameter=True, gram=gram, verify=False) as handle:
        loss_of(model(x)).backward()
        vectors = [p.grad for p in model.parameters()]
        handle.align({name: p.grad for name, p in model.named_parameters()} if rank else vectors)
        model.zero_grad()
        loss_of(model(x)).backward()
        aligned = handle.stats.aligned
        handle.align([v.full_tensor() for v in vectors])
        loss_of(model(x)).backward()
        assert torch.equal(handle.stats.aligned, aligned)
        return handle.stats.per_parameter.to_dict(), aligned, [v.full_tensor() for v in vectors]


def after_training(group, rank, options, momentum, restarts):
    """The parameters after some steps of RGD, which may go on in another model in their midst, by a checkpoint."""
    mesh = mesh_of(group)
    model, optimizer = _trained(mesh, group, options, momentum)
    for step in range(4):
        if restarts and step == 2:
            earlier, model_before = optimizer, model
            model, optimizer = _trained(mesh, group, options, momentum, seed=1)
            _pass_on(group, (model_before, earlier), (model, optimizer))
        optimizer.zero_grad()
        loss_of(model(steps_of(step, group.size())[rank])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return [whole(p).detach().clone() for p in model.parameters()]


def _pass_on(group, before, after):
    """Load a model and its optimizer from a checkpoint of another one."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder, group=group, group_src=0)
        where = {"checkpoint_id": folder[0], "process_group": group}
        checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(*before), strict=True)), **where)
        state = dict(zip(("model", "optimizer"), get_state_dict(*after), strict=True))
        checkpoint.load(state, **where)
        set_state_dict(*after, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        distributed.barrier(group)
    # `get_state_dict` leaves out what is neither state of a parameter nor an option.
    after[1].preconditioner.load_state_dict(before[1].preconditioner.state_dict())


def _trained(mesh, group, options, momentum, seed=0):
    model = model_of("MLP", seed=seed)
    children(model, mesh=mesh)
    return model, rgd_ext.RGD(model, lr=0.5, momentum=momentum, process_group=group, verify=False, **options)


def habits_of_trainers(group, rank, sizes):
    """The outcomes of backwards amid other things that programs do with sharded models, by what they do."""
    mesh, x, found = mesh_of(group), parts_of("MLP", sizes)[rank], {}
    model = sharded_model("MLP", "children", mesh)
    with rgd_ext.precondition(model, process_group=group, verify=False) as handle:

        def note(what):
            found[what] = outcome_of(model, handle)
            model.zero_grad()

        with torch.no_grad():
            model(x)
        loss_of(model(x)).backward()
        note("evaluated before")
        loss = loss_of(model(x))
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        note("second backward")
        model.set_reshard_after_backward(False)
        loss_of(model(x)).backward()
        note("not sharded after the backward")
        model.set_reshard_after_backward(True)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        loss_of(model(x)).backward()
        model.zero_grad()
        loss_of(model(x)).backward()
        note("assigned")
        with handle.paused():
            loss_of(model(x)).backward()
        paused = [p.grad for p in model.parameters()]
        model.zero_grad()
    loss_of(model(x)).backward()
    assert all(torch.equal(p.grad.to_local(), g.to_local()) for p, g in zip(model.parameters(), paused, strict=True))
    return found


def messages_of(group, rank, options):
    """How many numbers a backward sends, by what is sent, and the most that its buffers have in memory at a time."""
    model, x = sharded_model("MLP", "children", mesh_of(group)), parts_of("MLP", (3, 3))[rank]
    capture, options = capture_of(options)
    sent, alive, most, mean_of = Counter(), [], 0, MeanExchange.of
    start_all_reduce, start_sum, empty, rows_of = (
        Group.start_all_reduce,
        ShardedLayout._start_sum,
        Layout.empty,
        ShardedLayout._rows,
    )

    def note_all_reduce(self, what, buffer):
        sent[what] += buffer.numel()
        return start_all_reduce(self, what, buffer)

    def note_sum(self, group, what, rows):
        sent[what] += rows.numel()
        return start_sum(self, group, what, rows)

    def note_memory(buffers):
        nonlocal most
        for _ in range(40):
            alive[:] = [each for each in alive if each() is not None]
            if not alive:
                break
            time.sleep(0.05)  # a thread of gloo may not have let go yet
        alive.extend(map(weakref.ref, buffers))
        most = max(most, sum(each().numel() for each in alive))

    def note_empty(self):
        found = empty(self)
        note_memory(found.buffers)
        return found

    def note_of(*args):
        found = mean_of(*args)
        assert not found.own  # as large as the mean
        return found

    def note_rows(self):
        found = rows_of(self)
        note_memory(found[0])
        return found

    with (
        capture(model, process_group=group, verify=False, **options),
        mock.patch.object(Group, "start_all_reduce", note_all_reduce),
        mock.patch.object(ShardedLayout, "_start_sum", note_sum),
        mock.patch.object(Layout, "empty", note_empty),
        mock.patch.object(MeanExchange, "of", note_of),
        mock.patch.object(ShardedLayout, "_rows", note_rows),
    ):
        loss_of(model(x)).backward()
    return dict(sent), most
