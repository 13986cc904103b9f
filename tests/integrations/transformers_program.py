"""Trainings by the Trainer of Hugging Face in the processes of torchrun: torchrun transformers_program.py FOLDER.

Each process saves what its trainings leave, by their names, in a file of FOLDER.
"""

import torch
import transformers
from trainers import BATCH, CLIP, RATE, language_model, policy, save_outcomes, texts

import rgd_ext


class RGDTrainer(transformers.Trainer):
    """As docs/distributed.md has it."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.model_wrapped = self.accelerator.prepare(self.model)
            options = {"epsilon": policy(), "momentum": 0.9, "process_group": torch.distributed.group.WORLD}
            self.optimizer = rgd_ext.RGD(self.model_wrapped, lr=self.args.learning_rate, **options)
            self.optimizer.preconditioner.defer()
        return self.optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            rgd_ext.handle_of(self.model).write()
        return loss


class Noting(RGDTrainer):
    """Notes the batches of its process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def training_step(self, model, inputs, *args):
        self.batches.append((inputs["input_ids"], inputs["labels"]))
        return super().training_step(model, inputs, *args)


def trainer_of(seed, folder, dtype=torch.float64, **options):
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=BATCH, gradient_accumulation_steps=2,
        max_grad_norm=CLIP, num_train_epochs=2, learning_rate=RATE, save_strategy="steps", save_steps=1,
        report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    return Noting(language_model(seed).to(dtype), arguments, train_dataset=texts())


def outcome(trainer):
    parameters = [p.detach().clone() for p in trainer.model.parameters()]
    return {"parameters": parameters, "batches": trainer.batches}


def outcomes(rank, folder):
    """What the trainings leave, by name."""
    whole = trainer_of(rank, folder / "whole")
    whole.train()
    resumed = trainer_of(5, folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-1"))
    smoothed = trainer_of(rank, folder / "smoothed", label_smoothing_factor=0.1)
    smoothed.train()
    evaluated = trainer_of(rank, folder / "evaluated")
    evaluated.evaluate(texts())  # after that the Trainer does not wrap the model
    evaluated.train()
    half = trainer_of(rank, folder / "half", torch.float32, bf16=True)
    half.train()
    return {
        "whole": outcome(whole),
        "resumed": outcome(resumed),
        "smoothed": outcome(smoothed),
        "evaluated": outcome(evaluated),
        "bfloat16": outcome(half),
    }


if __name__ == "__main__":
    save_outcomes(outcomes)
