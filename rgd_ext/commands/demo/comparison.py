"""The trainings of the demo, their table and their figure."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from . import figure, optimizers, table
from .data import BATCH_SIZE, load
from .models import MODELS
from .progress import Trials
from .training import History, train

NOISE = {"clean labels": 0.0, "30 % wrong labels": 0.3}


def compare(seeds: int, epochs: int, output: Path) -> None:
    """Train both models with all optimizers on both kinds of labels, `seeds` times for `epochs` epochs each."""
    # The tensors are too small for a second thread, which would only make the timings noisier.
    torch.set_num_threads(1)
    start = time.perf_counter()
    results: dict[tuple[str, str], list[dict[str, History]]] = {
        (labels, model): [] for labels in NOISE for model in MODELS
    }
    with Trials(seeds * len(results), epochs) as trials:
        for seed in range(seeds):
            for (labels, model), histories in results.items():
                trials.begin(f"{labels}, {model}, seed {seed}")
                lr = optimizers.LEARNING_RATES[model]
                digits = load(NOISE[labels], seed)
                histories.append(train(MODELS[model], digits, lr, epochs, seed, trials.advance))
                trials.end()
    rates = ", ".join(f"{lr:g} ({model})" for model, lr in optimizers.LEARNING_RATES.items())
    terms = f"{seeds} seed{'s' * (seeds > 1)}, {epochs} epochs, batch size {BATCH_SIZE}, lr {rates}"
    console = Console(highlight=False)
    console.print(table.summary(results))
    console.print(
        f"{terms}, momentum {optimizers.MOMENTUM}; ± is the standard deviation over the seeds", soft_wrap=True
    )
    figure.draw(results, terms, output)
    console.print(f"{time.perf_counter() - start:.0f} s on one thread")
    # Not through the console, which would break a long path.
    print(output.resolve())
