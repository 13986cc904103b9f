"""Wrappers of torch.distributed around or inside of a captured model: exact or refused, and never wrong in silence."""

import re
from functools import partial

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

from torch.distributed.algorithms import Join
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
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
        with pytest.raises(RuntimeError, match=r"through a DistributedDataParallel.*precondition\(ddp\)"):
            wrapped(torch.randn(5, 6))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
@pytest.mark.parametrize("calls", ["wrapper", "module"])
def test_a_ddp_that_is_handed_in_passes_calls_on(options, calls):
    model, x = mlp(), torch.randn(5, 6)
    expected = captured_grad(model, x)
    model.zero_grad()
    wrapped = DistributedDataParallel(model, **options)
    with rgd_ext.precondition(wrapped) as handle:
        assert handle.model is model
        for _ in range(3):
            model.zero_grad()
            loss_of((wrapped if calls == "wrapper" else model)(x)).backward()
    assert_close(flat_grad(model), expected)


def test_a_ddp_exchanges_gradients_again_after_the_capture():
    model, x = mlp(), torch.randn(5, 6)
    loss_of(model(x)).backward()
    plain = flat_grad(model)
    wrapped = DistributedDataParallel(model)
    before = set(vars(wrapped))
    with rgd_ext.precondition(wrapped):
        loss_of(wrapped(x)).backward()
    assert set(vars(wrapped)) == before
    assert wrapped.require_backward_grad_sync
    assert wrapped.require_forward_param_sync
    for _ in range(2):
        model.zero_grad()
        loss_of(wrapped(x)).backward()
    with wrapped.no_sync():
        loss_of(wrapped(x)).backward()
    assert_close(flat_grad(model), 2 * plain)


@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters")
@pytest.mark.parametrize("option", ["static_graph", "hook", "ignored"])
def test_a_ddp_that_does_more_than_exchange_gradients_is_refused(option):
    model = mlp()
    if option == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    wrapped = DistributedDataParallel(model, static_graph=option == "static_graph")
    if option == "hook":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    with pytest.raises(ValueError, match=r"cannot follow.*rgd_ext\.precondition\(ddp\.module, process_group") as error:
        rgd_ext.precondition(wrapped)
    remedy = re.search(r"rgd_ext\.precondition\(.*?\)", str(error.value)).group()
    with eval(remedy, {"rgd_ext": rgd_ext, "ddp": wrapped}):
        loss_of(model(torch.randn(5, 6))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_sync_of_a_captured_ddp_needs_collected_backwards():
    model, parts = mlp(), torch.randn(6, 6).split([2, 4])
    with rgd_ext.precondition(model) as handle, handle.accumulate():
        for x in parts:
            loss_of(model(x)).backward()
    expected = flat_grad(model)
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    with rgd_ext.precondition(wrapped) as handle:
        with pytest.raises(RuntimeError, match=r"handle\.defer\(\)"), wrapped.no_sync():
            pass
        handle.defer()
        with wrapped.no_sync():
            loss_of(wrapped(parts[0])).backward()
        loss_of(wrapped(parts[1])).backward()
        handle.write()
        for joined in (wrapped.join, lambda: Join([wrapped])):
            with pytest.raises(
                RuntimeError, match=r"zero_grad\(\), `with handle\.accumulate\(\): pass` and optimizer\.step"
            ):
                joined()
    assert_close(flat_grad(model), expected)


def test_another_group_than_that_of_the_ddp_is_refused():
    wrapped, other = DistributedDataParallel(mlp()), distributed.new_group([0])
    with pytest.raises(ValueError, match="another one than that of the DistributedDataParallel"):
        rgd_ext.precondition(wrapped, process_group=other)
    rgd_ext.precondition(wrapped, process_group=distributed.group.WORLD).remove()


def test_an_optimizer_takes_a_ddp():
    wrapped, x = DistributedDataParallel(mlp()), torch.randn(5, 6)
    for _ in range(2):  # the second one takes the capture over
        optimizer = rgd_ext.RGD(wrapped, lr=0.1)
        loss_of(wrapped(x)).backward()
        optimizer.step()
    assert rgd_ext.handle_of(wrapped.module) is optimizer.preconditioner


def test_a_wrapper_is_not_taken_for_its_module_elsewhere():
    wrapped = DistributedDataParallel(mlp())
    for use in (rgd_ext.GaussNewton, lambda wrapped: rgd_ext.verify(wrapped, torch.randn(5, 6))):
        with pytest.raises(ValueError, match="is a DistributedDataParallel, which does not find the gradients"):
            use(wrapped)
    assert wrapped.require_backward_grad_sync
    with rgd_ext.precondition(wrapped) as handle:
        assert rgd_ext.handle_of(wrapped) is handle


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="is a DataParallel, which does not find the gradients"):
        rgd_ext.precondition(nn.DataParallel(mlp()))


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
    with pytest.raises(ValueError, match="DataParallel") as error:
        rgd_ext.precondition(nn.DataParallel(mlp()))
    with eval(str(error.value).split("`")[1], {"model": model, "torch": torch, "rgd_ext": rgd_ext}):
        loss_of(getattr(wrapped, "module", wrapped)(x)).backward()
    assert_close(flat_grad(model), expected)


def shard_one(model):
    fully_shard(model[0])
    return model


def flattened(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


DTENSORS, FLATTENED = r"are sharded.*before the capture.*process_group", r"is a FullyShardedDataParallel.*fully_shard"
SHARDED = {
    "fully_shard": (fully_shard, DTENSORS),
    "fully_shard of a part": (shard_one, DTENSORS),
    "FSDP": (flattened, FLATTENED),
    "FSDP, original": (partial(flattened, use_orig_params=True), FLATTENED),
}


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_models_are_refused(name):
    shard, message = SHARDED[name]
    with pytest.raises(ValueError, match=message):
        rgd_ext.precondition(shard(mlp()))
    model = mlp()
    rgd_ext.precondition(model)
    model = shard(model)
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


REFUSED = {
    "SyncBatchNorm": (nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4)), "batch_norm='contribution'"),
    "Embedding": (nn.Embedding(5, 3, sparse=True), "sparse=False"),
    "EmbeddingBag": (nn.EmbeddingBag(5, 3, mode="sum", sparse=True), "sparse=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_several_processes_cannot_train_are_refused(name):
    model, remedy = REFUSED[name]
    options = {"process_group": distributed.group.WORLD, "batch_norm": "contribution"}
    with pytest.raises(ValueError, match=rf"\({name}\).*{remedy}|is a {name}.*{remedy}"):
        rgd_ext.precondition(model, **options)
    rgd_ext.precondition(model.eval() if name == "SyncBatchNorm" else type(model)(5, 3), **options).remove()


def test_the_local_mode_needs_a_group():
    for mode in ("local", "global"):
        with pytest.raises(ValueError, match=f"mode is '{mode}': choose 'exact', or 'local' together with"):
            rgd_ext.precondition(mlp(), mode=mode)
