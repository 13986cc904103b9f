"""Lightning with `RGDCallback` in one process: steps along the direction of all micro-batches, and their statistics."""

import logging
import os
from unittest import mock

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from trainers import BATCH, CLIP, DATA, RATE, mlp, policy, union_step

import rgd_ext

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.plugins import MixedPrecision

from rgd_ext.integrations.lightning import RGDCallback, RGDStrategy

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning
BATCHES = [DATA[start : start + BATCH] for start in range(0, len(DATA), BATCH)]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class Model(pl.LightningModule):
    """An MLP, captured as a whole."""

    def __init__(self):
        super().__init__()
        self.net = mlp(0)

    def forward(self, x):
        return self.net(x.to(self.net[0].weight.dtype))

    def training_step(self, batch):
        return mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return rgd_ext.RGD(self, lr=RATE, momentum=0.9, epsilon=policy())


class Part(Model):
    """Its net alone is captured, for another optimizer."""

    def configure_optimizers(self):
        if rgd_ext.handle_of(self.net) is None:
            rgd_ext.precondition(self.net, epsilon=policy())
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


class NotCaptured(Model):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


def trainer_of(*callbacks, epochs=1, accumulate=2, **options):
    options = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "gradient_clip_val": CLIP} | options
    return pl.Trainer(
        max_epochs=epochs, accumulate_grad_batches=accumulate, callbacks=[*callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def fit(model, *callbacks, resume=None, **options):
    """The Trainer after a training with the callback."""
    trainer = trainer_of(RGDCallback(), *callbacks, **options)
    trainer.fit(model, DataLoader(DATA, BATCH), ckpt_path=resume, weights_only=False)
    return trainer


def test_lightning_without_the_callback_warns_where_it_accumulates():
    with pytest.warns(UserWarning, match=r"sum of 2 directions.*RGDCallback"):
        trainer_of().fit(Model(), DataLoader(DATA, BATCH))


def by_hand(epochs=1, accumulate=2):
    """The parameters after the same training without Lightning."""
    model = mlp(0)
    optimizer = rgd_ext.RGD(model, lr=RATE, momentum=0.9, epsilon=policy())
    for _ in range(epochs):
        for start in range(0, len(BATCHES), accumulate):
            union_step(model, optimizer, BATCHES[start : start + accumulate], of=accumulate)
    return list(model.parameters())


def assert_same(model, expected):
    torch.testing.assert_close(list(model.parameters()), expected)


@pytest.mark.parametrize("kind", [Model, Part])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_each_step_is_along_the_direction_of_its_micro_batches_and_clipped(kind, accumulate):
    model = kind()
    fit(model, accumulate=accumulate)
    assert_same(model, by_hand(accumulate=accumulate))


def test_a_resumed_training_goes_on_along_its_trajectory(tmp_path):
    fit(Model()).save_checkpoint(tmp_path / "half.ckpt")
    model = Model()
    fit(model, epochs=2, resume=tmp_path / "half.ckpt")
    assert_same(model, by_hand(epochs=2))


def test_the_accumulation_may_change_from_epoch_to_epoch():
    model, expected = Model(), mlp(0)
    fit(model, pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}), epochs=2, accumulate=1)
    optimizer = rgd_ext.RGD(expected, lr=RATE, momentum=0.9, epsilon=policy())
    for accumulate in 1, 2:
        for start in range(0, len(BATCHES), accumulate):
            union_step(expected, optimizer, BATCHES[start : start + accumulate], of=accumulate)
    assert_same(model, list(expected.parameters()))


class Logging(pl.Callback):
    """Keeps what is logged in each step, and the statistics of it."""

    def __init__(self):
        self.logged, self.stats = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.logged.append(dict(trainer.callback_metrics))
        self.stats.append(next(handle for part in module.modules() if (handle := rgd_ext.handle_of(part))).stats)


@pytest.mark.parametrize(("kind", "prefix"), [(Model, "rgd/"), (Part, "rgd/net/")])
def test_the_statistics_of_the_step_are_logged(kind, prefix):
    log = Logging()
    fit(kind(), log)
    for logged, stats in list(zip(log.logged, log.stats, strict=True))[1::2]:
        for name in ("epsilon", "trace", "rayleigh", "cosine", "effective_sample_size", "grad_norm", "batch_size"):
            assert logged[prefix + name].item() == pytest.approx(float(getattr(stats, name)), rel=1e-6)
        assert logged[f"{prefix}lambda_max"].item() == pytest.approx(stats.largest_eigenvalue.item(), rel=1e-6)


def test_statistics_are_logged_in_the_steps_in_which_the_trainer_logs():
    log = Logging()
    fit(Model(), log, accumulate=1, log_every_n_steps=2)
    epsilons = [logged.get("rgd/epsilon") for logged in log.logged]
    assert epsilons[0] is None
    assert epsilons[1] == epsilons[2] != epsilons[3]


def test_nothing_is_logged_where_the_trainer_logs_nothing():
    log = Logging()
    fit(Model(), log, log_every_n_steps=0)
    assert not [name for logged in log.logged for name in logged if name.startswith("rgd/")]


class Uneven(Part):
    """Its optimizer steps after every second batch, by hand."""

    automatic_optimization = False

    def training_step(self, batch, index):
        if index == 0:
            rgd_ext.handle_of(self.net).defer()
        self.manual_backward(super().training_step(batch))
        if index % 2:
            rgd_ext.handle_of(self.net).write()
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_in_manual_optimization_the_statistics_of_the_last_step_are_logged():
    log = Logging()
    fit(Uneven(), log, accumulate=1, log_every_n_steps=4, gradient_clip_val=None)
    assert log.logged[3]["rgd/net/trace"].item() == pytest.approx(log.stats[3].trace.item(), rel=1e-6)
    assert log.stats[3] is not log.stats[1]


class Writing(Model):
    """Defers and writes by itself."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.preconditioner.defer()
        return optimizer

    def on_before_optimizer_step(self, optimizer):
        rgd_ext.handle_of(self).write()


def test_a_module_that_defers_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"handle of the Writing defers, .* leave out the callback"):
        fit(Writing())
    model = Writing()
    trainer_of(accumulate=2).fit(model, DataLoader(DATA, BATCH))  # the remedy
    assert_same(model, by_hand())


class Stopping(pl.Callback):
    """Stops a training after its first micro-batch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


class Failing(pl.Callback):
    def on_train_batch_end(self, *args):
        raise ArithmeticError


def test_a_training_that_stopped_within_a_step_leaves_nothing_to_the_next():
    model = Part()
    fit(model, Stopping())
    with pytest.raises(ArithmeticError):
        fit(model, Failing())
    assert_same(model, list(mlp(0).parameters()))
    model.net(DATA[:3][0]).sum().backward()  # writes by itself again
    assert rgd_ext.handle_of(model.net).stats.batch_size == 3


def scaling():
    """float16 with a GradScaler, which Lightning itself leaves out on the CPU."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))}


@pytest.fixture
def group_of_one():
    """What a strategy of processes leaves behind goes."""
    with mock.patch.dict(os.environ):
        yield
    torch.distributed.destroy_process_group()


def test_accumulation_with_a_grad_scaler_is_refused_and_the_strategy_does_it(group_of_one):
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 and precision '16-mixed'"):
        fit(Model().float(), **scaling())
    model, half = Model().float(), Model().float()
    fit(model)
    fit(half, strategy=RGDStrategy(), use_distributed_sampler=False, **scaling())
    torch.testing.assert_close(list(half.parameters()), list(model.parameters()), rtol=0, atol=2e-3)


def test_a_grad_scaler_without_accumulation_works():
    model, half = Model().float(), Model().float()
    fit(model, accumulate=1)
    fit(half, accumulate=1, **scaling())
    torch.testing.assert_close(list(half.parameters()), list(model.parameters()), rtol=0, atol=2e-3)


def test_a_module_without_a_capture_is_refused():
    with pytest.raises(ValueError, match="no captured module in the NotCaptured"):
        fit(NotCaptured())
