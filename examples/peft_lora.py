"""PEFT: LoRA adapters of a small GPT-2 are trained along the RGD direction, and all other weights stay as they are.

    python examples/peft_lora.py     # needs peft and transformers

The model learns to count on by ones, its adapters then learn to count on by twos, and the losses of both are:

    loss                 by-ones   by-twos
    the-model             0.0078    5.8555
    with-adapters         5.1965    0.0147
    without-adapters      0.0078    5.8555
"""

import argparse

import peft
import torch
import transformers

import rgd_ext

SIZES = {"vocab_size": 24, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 2}


def numbers(step: int) -> torch.Tensor:
    """Sequences that count on by `step` modulo 24, (24, 12)."""
    return (torch.arange(24)[:, None] + step * torch.arange(12)) % 24


def train(model: torch.nn.Module, step: int, steps: int) -> None:
    """Train what is not frozen to count on by `step`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=numbers(step), labels=numbers(step)).loss.backward()
        optimizer.step()


@torch.no_grad()
def report(name: str, model: torch.nn.Module) -> None:
    """Print the losses of a model."""
    model.eval()
    print(f"{name:<18}", *(f"{model(input_ids=numbers(n), labels=numbers(n)).loss:>9.4f}" for n in (1, 2)))


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
train(model, 1, steps)
print(f"{'loss':<18}   by-ones   by-twos")
report("the-model", model)
layers = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}  # those of GPT-2 have W^T
model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, **layers))
rgd_ext.precondition(model, epsilon=rgd_ext.Rayleigh(0.3))  # of the adapters, which alone are trained
train(model, 2, steps)
report("with-adapters", model)
with model.disable_adapter():
    report("without-adapters", model)
