"""The Trainer of Hugging Face: accumulation, checkpointing, label smoothing, logged statistics, and a resumed run.

    python examples/transformers_trainer.py --model gpt2     # or bert, or vit; needs transformers and accelerate

A step takes the direction of both of its micro-batches, and the resumed run goes on from the middle:

    step                       loss             batch_size                epsilon  effective_sample_size
    20                      2.68796               32.00000                0.46001               28.54650
    40                      2.17202               32.00000                0.68989               28.10759
    resumed                 2.17202               32.00000                0.68989               28.10759
"""

import argparse
import tempfile

import torch
import transformers

import rgd_ext
from rgd_ext.integrations.transformers import RGDTrainer, StatsCallback

KINDS = {"gpt2": "CausalLM", "bert": "SequenceClassification", "vit": "ImageClassification"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 32}
COLUMNS = "loss", "rgd/batch_size", "rgd/epsilon", "rgd/effective_sample_size"
parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=KINDS, default="gpt2")
parser.add_argument("--steps", type=int, default=40)
name, steps = vars(parser.parse_args()).values()
torch.manual_seed(0)
classes = torch.randint(2, (256,))
tokens = (torch.randint(32, (256, 1)) + (1 + classes[:, None]) * torch.arange(12)) % 32  # count by ones or by twos
inputs = torch.randn(256, 1, 16, 16) + classes.view(-1, 1, 1, 1) if name == "vit" else tokens
config = transformers.AutoConfig.for_model(name, **SIZES, image_size=16, patch_size=4, num_channels=1)


def trained(folder: str, resume: str | None = None) -> list[dict[str, float]]:
    """What the Trainer logs of a training: losses, and statistics of the steps."""
    model = getattr(transformers, f"AutoModelFor{KINDS[name]}").from_config(config)
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, gradient_accumulation_steps=2, learning_rate=3e-3,
        label_smoothing_factor=0.1, activation_checkpointing=True, disable_tqdm=True, report_to=[], use_cpu=True,
        activation_checkpointing_kwargs={"use_reentrant": False}, logging_steps=steps // 2, save_steps=steps // 2,
    )  # fmt: skip
    labels = tokens if name == "gpt2" else classes
    data = [{model.main_input_name: x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    trainer = RGDTrainer(model, arguments, train_dataset=data, precondition={"epsilon": rgd_ext.Rayleigh(0.3)})
    trainer.add_callback(StatsCallback(trainer))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    *rows, _ = trainer.state.log_history  # each loss is followed by the statistics; the last row is a summary
    return [loss | statistics for loss, statistics in zip(rows[::2], rows[1::2], strict=True)]


with tempfile.TemporaryDirectory() as folder:
    rows = trained(folder)
    if name != "vit":  # transformers 5.24 does not find the weights in its own checkpoints of a ViT
        rows += [trained(folder, f"{folder}/checkpoint-{steps // 2}")[-1] | {"step": "resumed"}]
print(f"{'step':<8}", *(f"{column.rpartition('/')[2]:>22}" for column in COLUMNS))
for row in rows:
    print(f"{row['step']:<8}", *(f"{row[column]:>22.5f}" for column in COLUMNS))
