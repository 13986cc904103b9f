"""What the tests of trainers have in common: data, models, how two processes run, and a step of one process."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import rgd_ext

ROOT = Path(__file__).parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
RATE, CLIP, BATCH = 0.5, 0.05, 4


def data(size, seed):
    """Samples of a regression."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.sin(3 * x[:, :2]))


# 11 samples for each of two processes, in batches of 4, 4 and 3.
DATA, VALIDATION = data(22, 0), data(8, 1)


def mlp(seed):
    """A model in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def policy():
    """A policy that remembers its eigenvalue, which a training that is resumed needs."""
    return rgd_ext.Spectral(0.5, every=3)


def union_step(model, optimizer, batches, of, loss=mse_loss):
    """A step of one process along the direction of the union of batches.

    Args:
        of: what the sum of their losses is divided by.
    """
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    with rgd_ext.handle_of(model).accumulate():
        for x, y in batches:
            (loss(model(x.to(dtype) if x.is_floating_point() else x), y) / of).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


def run_two(tmp_path_factory, program, launcher=()):
    """What a program leaves in its two processes; the workers of a run of tests share what one of them has run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / program
    with FileLock(f"{folder}.lock"):
        if not (folder / "1.pt").exists():
            folder.mkdir(exist_ok=True)
            run(folder, program, launcher)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def run(folder, program, launcher):
    """Run a program in a folder until it ends, without errors."""
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, ROOT / "tests/integrations" / program, folder]
    result = subprocess.run(
        command, env=os.environ | variables, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-4000:]


def save_outcomes(outcomes):
    """Save what the trainings of a program leave in this process of torchrun, for `run_two`.

    Args:
        outcomes: (rank, folder) -> what they leave, by name.
    """
    warnings.simplefilter("ignore")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.save(outcomes(rank, folder), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def texts():
    """Sequences of tokens of different lengths, whose padding has no loss."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in torch.randint(4, 9, (22,), generator=generator).tolist():
        tokens = torch.randint(16, (8,), generator=generator)
        labels = torch.where(torch.arange(8) < length, tokens, -100)
        found.append({"input_ids": tokens, "labels": labels})
    return found


def language_model(seed):
    """A model of transformers in float64."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=16, max_position_embeddings=8, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config).double()


# What models of transformers are for, and their sizes, all without dropout.
HEADS = {"gpt2": "CausalLM", "bert": "SequenceClassification", "vit": "ImageClassification"}
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")


def transformer(name):
    """A tiny model of transformers for that task."""
    import transformers

    shape = {"image_size": 4, "patch_size": 2, "num_channels": 1} if name == "vit" else {"vocab_size": 16}
    options = SIZES | shape | dict.fromkeys(DROPOUTS, 0.0) | {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **options)
    return getattr(transformers, f"AutoModelFor{HEADS[name]}").from_config(config)


class Logits(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(**{self.model.main_input_name: x}).logits


def assert_same_as(outcomes, name, expected, **tolerance):
    """The parameters of both processes have the same bits, and are those of one process to rounding."""
    first, second = (outcome[name]["parameters"] for outcome in outcomes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, **tolerance)
