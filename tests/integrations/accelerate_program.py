"""Trainings with Accelerate in the processes of torchrun: torchrun accelerate_program.py FOLDER.

Each process saves what its trainings leave, by their names, in a file of FOLDER.
"""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from trainers import BATCH, CLIP, DATA, RATE, mlp, policy, save_outcomes

import rgd_ext


class Training:
    """A training as docs/distributed.md has it; it notes the batches of this process."""

    def __init__(self, seed, dtype=torch.float64, momentum=0.9, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        self.model, self.loader = self.accelerator.prepare(mlp(seed).to(dtype), DataLoader(DATA, BATCH))
        self.optimizer = rgd_ext.RGD(self.model, lr=RATE, momentum=momentum, epsilon=policy())
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.handle = rgd_ext.handle_of(self.model)
        self.handle.defer()
        self.dtype, self.batches = dtype, []

    def epoch(self):
        for x, y in self.loader:
            self.batches.append((x, y))
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(mse_loss(self.model(x.to(self.dtype)), y))
                if self.accelerator.sync_gradients:
                    self.handle.write()
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def outcome(self):
        return {"parameters": [p.detach().clone() for p in self.model.parameters()], "batches": self.batches}


def outcomes(rank, folder):
    """What the trainings leave, by name."""
    torch.manual_seed(0)
    whole = Training(seed=rank)
    whole.epoch()
    whole.accelerator.save_state(folder / "half")
    whole.epoch()

    resumed = Training(seed=5)
    resumed.accelerator.load_state(folder / "half")
    resumed.epoch()

    AcceleratorState._reset_state()
    half = Training(seed=rank, dtype=torch.float32, momentum=0, mixed_precision="bf16")
    half.epoch()
    return {"whole": whole.outcome(), "resumed": resumed.outcome(), "bfloat16": half.outcome()}


if __name__ == "__main__":
    save_outcomes(outcomes)
