"""Wrappers of torch.distributed around or inside of a captured model are refused; none gives wrong gradients."""

import pytest
import torch
from capturing import captured_grad, loss_of
from models import mlp
from oracle import assert_close, flat_grad
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rgd_ext

if not distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*(FSDP|FullyShardedDataParallel|sharding|c10d)"
)


@pytest.fixture(autouse=True, scope="module")
def _process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_around_a_captured_model_is_refused(options):
    model = mlp()
    with rgd_ext.precondition(model):
        wrapped = DistributedDataParallel(model, **options)
        with pytest.raises(RuntimeError, match=r"inside a DistributedDataParallel.*all_reduce"):
            wrapped(torch.randn(5, 6))
    assert all(p.grad is None for p in model.parameters())


def test_a_ddp_model_cannot_be_captured():
    model = mlp()
    wrapped = DistributedDataParallel(model)
    for capture in (rgd_ext.precondition, lambda model: rgd_ext.RGD(model, lr=0.1)):
        with pytest.raises(ValueError, match=r"is a DistributedDataParallel.*all_reduce"):
            capture(wrapped)
    with rgd_ext.precondition(model), pytest.raises(RuntimeError, match="inside a DistributedDataParallel"):
        wrapped(torch.randn(5, 6))


def test_ddp_around_a_part_of_a_captured_model_is_refused():
    model = mlp()
    with rgd_ext.precondition(model):
        model[0] = DistributedDataParallel(model[0])
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            model(torch.randn(5, 6))


def test_a_captured_model_that_another_one_in_ddp_calls_is_exact():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x) + teacher(x)

    teacher, student, x = mlp(), Student(), torch.randn(5, 6)
    with rgd_ext.precondition(teacher):
        loss_of(DistributedDataParallel(student)(x)).backward()
    found = flat_grad(teacher)
    teacher.zero_grad()
    with torch.no_grad():
        others = student.body(x)
    assert_close(found, captured_grad(teacher, x, loss=lambda out: loss_of(out + others)))


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel], ids=["alone", "after DDP"])
def test_the_remedy_in_the_message_gives_the_direction_of_one_process(wrap):
    model, x = mlp(), torch.randn(5, 6)
    model[2].bias.requires_grad_(False)
    expected = captured_grad(model, x)
    model.zero_grad()
    wrapped = wrap(model)
    with rgd_ext.precondition(model):
        with pytest.raises(ValueError, match="DistributedDataParallel") as error:
            rgd_ext.precondition(DistributedDataParallel(mlp()))
        loss_of(getattr(wrapped, "module", wrapped)(x)).backward()
        exec(str(error.value).split("`")[1], {"model": model, "torch": torch})
    assert torch.equal(flat_grad(model), expected)


def shard_one(model):
    fully_shard(model[0])
    return model


SHARDED = {
    "fully_shard": fully_shard,
    "fully_shard of a part": shard_one,
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP, original": lambda model: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    ),
}


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_models_are_refused(name):
    with pytest.raises(ValueError, match=r"are sharded.*all_reduce"):
        rgd_ext.precondition(SHARDED[name](mlp()))
    model = mlp()
    rgd_ext.precondition(model)
    model = SHARDED[name](model)
    with pytest.raises(ValueError, match="are sharded"):
        model(torch.randn(5, 6))


@pytest.mark.filterwarnings("ignore:There is a performance drop.*_weight_norm")
def test_a_parameter_that_is_gone_since_the_capture_is_named():
    model = mlp()
    with rgd_ext.precondition(model):
        nn.utils.parametrizations.weight_norm(model[0])
        with pytest.raises(ValueError, match=r"'weight' of module '0' is gone since the capture.*\.remove\(\)"):
            model(torch.randn(5, 6))
    assert captured_grad(model, torch.randn(5, 6)).isfinite().all()
