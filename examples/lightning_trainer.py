"""PyTorch Lightning: bf16-mixed, gradient accumulation, clipping, logged statistics, and a run that is resumed.

    python examples/lightning_trainer.py     # needs lightning and scikit-learn

A step takes the direction of four batches. The last row is that of the resumed run:

    epoch                    loss             batch_size                epsilon  effective_sample_size
    1                     1.76319              128.00000                0.09072              126.54200
    2                     0.45833              128.00000                0.02551              124.84862
    2                     0.45833              128.00000                0.02551              124.84862
"""

import tempfile

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import rgd_ext
from rgd_ext.integrations.lightning import RGDCallback

COLUMNS = "loss", *(f"rgd/{name}" for name in ("batch_size", "epsilon", "effective_sample_size"))


class Digits(pl.LightningModule):
    """An MLP on handwritten digits, which prints what is logged in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:  # noqa: D102
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return rgd_ext.RGD(self, lr=0.1, momentum=0.9)

    def on_train_epoch_end(self) -> None:  # noqa: D102
        print(f"{self.current_epoch + 1:<6}", *(f"{self.trainer.callback_metrics[name]:>22.5f}" for name in COLUMNS))


images, digits = (torch.tensor(array[:1792]) for array in load_digits(return_X_y=True))
data = DataLoader(TensorDataset(images.float() / 8 - 1, digits), batch_size=32)
options = {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
print(f"{'epoch':<6}", *(f"{name.rpartition('/')[2]:>22}" for name in COLUMNS))
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    for resume in None, f"{folder}/epoch=0.ckpt":
        callbacks = [RGDCallback(), pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **options, **quiet)
        trainer.fit(Digits(), data, ckpt_path=resume, weights_only=False)
