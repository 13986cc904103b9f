"""What a captured model refuses where it is sharded: functions that run in each process, and give the messages."""

import warnings

import torch
from capturing import loss_of
from distributed_cases import model_of, parts_of
from sharding import children, error_of, mesh_of, root, sharded_model, without_root
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rgd_ext


def capture_error(model, group, **options):
    """The error of a capture, which leaves the model alone."""
    found = error_of(rgd_ext.precondition, model, process_group=group, verify=False, **options)
    assert rgd_ext.handle_of(model) is None
    return found


PARALLEL = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def captures_of_parallel_models(group, rank):
    """The errors of captures with tensor parallelism, alone and under `fully_shard`."""
    found = {"alone": capture_error(parallelize_module(model_of("MLP", 0), mesh_of(group), PARALLEL), group)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(model_of("MLP", 0), mesh["tensor"], PARALLEL)
    children(model, mesh=mesh["data"])
    found["under fully_shard"] = capture_error(model, group)
    return found


def captures_of_other_meshes(group, rank):
    """The errors of captures with a group of more processes than the mesh has, and with a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return {
        "part": capture_error(sharded_model("MLP", "children", mesh["b"]), group),
        "mesh of two dimensions": capture_error(sharded_model("MLP", "root", mesh), mesh),
    }


def refusals_of(group, rank):
    """The errors of what is done with a sharded model, by what it is."""
    mesh, x, found = mesh_of(group), parts_of("MLP", (3, 3))[rank], {}
    model = nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3))
    fully_shard(model[1].self_attn.out_proj, mesh=mesh)
    found["inside of a layer"] = capture_error(model, group)

    model = sharded_model("MLP", "children", mesh)
    found["without a group"] = error_of(rgd_ext.precondition, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = rgd_ext.precondition(model, process_group=group)
    found["not verified"] = next(str(each.message) for each in caught if "verified" in str(each.message))
    with handle:
        found["plan"] = error_of(handle.plan, x)
        found["verify"] = error_of(rgd_ext.verify, model, x)
        found["diffusion"] = error_of(rgd_ext.DiffusionMatrix.from_batch, model, nn.MSELoss(), x, x[:, :3])
        found["vector"] = error_of(handle.align, [torch.ones(2)])
        model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
        found["hook"] = error_of(lambda: loss_of(model(x)).backward())
        found["empty batch"] = error_of(lambda: loss_of(model(x[:0])).backward())
        assert all(p.grad is None for p in model.parameters()), "a gradient"
    model = sharded_model("MLP", "children", mesh)
    with rgd_ext.precondition(model, process_group=group, verify=False):
        found["penalty"] = error_of(lambda: (loss_of(model(x)) + model[0].weight.to_local().sum()).backward())

    model = model_of("MLP", 0)
    without_root(model, mesh=mesh)
    with rgd_ext.precondition(model, process_group=group, verify=False):
        root(model, mesh=mesh)
        found["sharded later"] = error_of(lambda: loss_of(model(x)).backward())
    whole = model_of("MLP", 0)
    with rgd_ext.precondition(whole, process_group=group):
        root(whole, mesh=mesh)
        found["sharded later, whole"] = error_of(lambda: loss_of(whole(x)).backward())
    return found
