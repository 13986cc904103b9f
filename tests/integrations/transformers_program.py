"""Trainings by the Trainer of Hugging Face in the processes of torchrun: torchrun transformers_program.py FOLDER.

Each process saves what its trainings leave, by their names, in a file of FOLDER.
"""

import torch
import transformers
from trainers import BATCH, CLIP, RATE, language_model, policy, save_outcomes, texts

from rgd_ext.integrations.transformers import RGDTrainer, StatsCallback


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
        report_to=[], disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    sgd = torch.optim.SGD, {"lr": RATE, "momentum": 0.9}
    options = {"precondition": {"epsilon": policy()}, "optimizer_cls_and_kwargs": sgd}
    trainer = Noting(language_model(seed).to(dtype), arguments, train_dataset=texts(), **options)
    trainer.add_callback(StatsCallback(trainer))
    return trainer


def outcome(trainer):
    parameters = [p.detach().clone() for p in trainer.model.parameters()]
    return {"parameters": parameters, "batches": trainer.batches, "log": trainer.state.log_history}


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
