"""Trainings by Lightning in two processes, the second of which it starts itself: python lightning_program.py FOLDER.

Each process saves what its trainings leave, by their names, in a file of FOLDER.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from trainers import BATCH, CLIP, DATA, RATE, VALIDATION, mlp, policy

import rgd_ext
from rgd_ext.integrations.lightning import RGDCallback, RGDStrategy


class Model(pl.LightningModule):
    """An MLP, captured as a whole."""

    def __init__(self, seed, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.net = mlp(seed)

    def forward(self, x):
        return self.net(x.to(self.net[0].weight.dtype))

    def training_step(self, batch, _):
        loss = mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, _):
        self.log("validation", mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        group = torch.distributed.group.WORLD
        optimizer = rgd_ext.RGD(self, lr=RATE, momentum=self.momentum, epsilon=policy(), process_group=group)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class InParts(Model):
    """Its net alone is captured, and trained by another optimizer; the other part is frozen."""

    def __init__(self, seed):
        super().__init__(seed)
        self.shift = nn.Parameter(torch.full((2,), float(seed)), requires_grad=False)

    def forward(self, x):
        return super().forward(x) + self.shift

    def configure_optimizers(self):
        rgd_ext.precondition(self.net, epsilon=policy(), process_group=torch.distributed.group.WORLD)
        return self.sgd()

    def sgd(self):
        return torch.optim.SGD(self.net.parameters(), RATE)


class WithoutGroup(Model):
    """Each process would train a model of its own."""

    def configure_optimizers(self):
        return rgd_ext.RGD(self, lr=RATE)


class NotCaptured(InParts):
    """One layer has no capture."""

    def configure_optimizers(self):
        rgd_ext.precondition(self.net[0], epsilon=policy(), process_group=torch.distributed.group.WORLD)
        return self.sgd()


class Stopped(InParts):
    """Its first training stops in the midst of an accumulation; the capture stays."""

    has_stopped = False

    def training_step(self, batch, index):
        self.trainer.should_stop = not self.has_stopped
        self.has_stopped = True
        return super().training_step(batch, index)

    def configure_optimizers(self):
        return super().configure_optimizers() if rgd_ext.handle_of(self.net) is None else self.sgd()


class Manual(Model):
    """The steps are those of `Model` with accumulation, made by the module itself."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, is_last = self.optimizers(), index % 2 == 1 or self.trainer.is_last_batch
        with optimizer.toggle_model(sync_grad=is_last):
            self.manual_backward(mse_loss(self(batch[0]), batch[1]) / 2)
        if is_last:
            self.clip_gradients(optimizer, CLIP)
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


class Wrapped(Model):
    """For the strategy "ddp": what it has wrapped is captured."""

    def configure_optimizers(self):
        return rgd_ext.RGD(self.trainer.model, lr=RATE, momentum=self.momentum, epsilon=policy())


def fitted(model, epochs, resume=None, save=None, precision="64-true", accumulate=2, clip=CLIP, strategy=None):
    """The parameters of a model after a training, and what it has logged."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy or RGDStrategy(), max_epochs=epochs, precision=precision,
        accumulate_grad_batches=accumulate, gradient_clip_val=clip, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[RGDCallback()], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader(DATA, BATCH), DataLoader(VALIDATION, BATCH), ckpt_path=resume, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"parameters": [p.detach().clone() for p in model.parameters()], "logged": logged}


def outcomes(rank, folder):
    """What the trainings leave, by name."""
    checkpoint = str(folder / "half.ckpt")
    found = {"whole": fitted(Model(seed=rank), 2)}
    fitted(Model(seed=rank), 1, save=checkpoint)
    found["resumed"] = fitted(Model(seed=5), 2, resume=checkpoint)
    model = Model(seed=rank)
    fitted(model, 1)
    found["fit twice"] = fitted(model, 1)
    found["manual"] = fitted(Manual(seed=rank), 2, accumulate=1, clip=None)
    found["in parts"] = fitted(InParts(seed=rank), 1, accumulate=1)
    model = Stopped(seed=rank)
    fitted(model, 1)
    found["stopped"] = fitted(model, 1)
    found["bfloat16"] = fitted(Model(seed=rank, momentum=0).float(), 1, precision="bf16-mixed")
    found["wrapped"] = fitted(Wrapped(seed=rank), 1, strategy="ddp")
    found["not captured"] = refusal_of(NotCaptured(seed=rank))
    found["without a group"] = refusal_of(WithoutGroup(seed=rank))
    return found


def refusal_of(model):
    """The error of a training; None without one."""
    try:
        fitted(model, 1)
    except ValueError as error:
        return str(error)
    return None


def main():
    warnings.simplefilter("ignore")
    logging.disable()
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # Lightning starts the others
    torch.save(outcomes(rank, folder), folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
