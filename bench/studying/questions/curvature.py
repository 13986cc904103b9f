"""Question 2: the diffusion matrix and the Hessian along trainings, with clean and with wrong labels."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from ..comparisons import Interval, mean
from ..curvature import SHARED, compare
from ..data import DIGITS, Sources
from ..plotting import COLOURS, band
from ..question import Answer, Config, Finished, Question, Scope, Table
from ..task import task_of
from ..training import batches_of, initial_model, method_of

# The Hessian of a large convolutional network would take minutes at each point.
MODELS = {DIGITS: ("small MLP", "small CNN"), "fashion-mnist": ("MLP",)}
LABELS = ("clean", "symmetric 0.4")
TRAINING = {"samples": 1000, "method": "SGD", "lr": 0.05, "momentum": 0.9, "batch_size": 50}
POINTS = (0, 20, 60, 200, 600)  # steps after which D and H are compared
SEEDS = range(10)
SHOWN = (0, 60, 600)  # in the table


def plan(finished: Finished, scope: Scope) -> list[Config]:
    """All seeds of both kinds of labels, for each data set that is there and its models."""
    models = [(data, model) for data in scope.data for model in MODELS.get(data, ())]
    seeds, points = SEEDS, POINTS
    if scope.quick:
        models, seeds, points = models[:1], range(2), POINTS[:3]
    return [
        TRAINING | {"data": data, "model": model, "labels": labels, "seed": seed, "steps": points[-1]}
        for seed in seeds
        for (data, model), labels in product(models, LABELS)
    ]


def run(config: Config, sources: Sources) -> dict[str, Any]:
    """What `compare` gives at the `POINTS`, as lists. The learning rate is constant."""
    task = task_of(config | {"evaluate": "test"}, sources)
    model = initial_model(config, task)
    found = [compare(model, task.train)]
    with method_of(config).start(model, config["lr"], config["momentum"], task.counts) as step:
        for number, batch in enumerate(batches_of(config, task.train), 1):
            step(batch.inputs, batch.labels)
            if number in POINTS:
                found.append(compare(model, task.train))
    return {name: [each[name] for each in found] for name in found[0]}


def curves(finished: Finished, name: str, **config: object) -> np.ndarray:
    """A quantity at all points, (seeds, points); of eigenvalues the largest."""
    values = np.array([line.outcome[name] for line in finished.where(**config)])
    return values[..., 0] if values.ndim == 3 else values


def settings(finished: Finished) -> list[dict[str, str]]:
    """Data, model and labels that were run, in the order of the lines."""
    names = ("data", "model", "labels")
    found = dict.fromkeys(tuple(line.config[name] for name in names) for line in finished)
    return [dict(zip(names, values, strict=True)) for values in sorted(found)]


def answer(finished: Finished) -> Answer:
    """Cosines, multiples and eigenvalues by setting and step, with intervals over the seeds."""
    rows, numbers = [], {}
    for setting in settings(finished):
        quantities = {name: curves(finished, name, **setting) for name in QUANTITIES}
        for at, step in enumerate(POINTS[: quantities["loss"].shape[1]]):
            found = {name: mean(values[:, at]) for name, values in quantities.items()}
            if step in SHOWN:
                rows.append([*setting.values(), str(step), *(text(found[name]) for name in QUANTITIES)])
            slug = "_".join(setting.values()).replace(" ", "_").replace("-", "_").replace(".", "")
            numbers |= {f"{slug}.{name}.{step}": f"{each.mean:.2f}" for name, each in found.items()}
    table = Table(("data", "model", "labels", "step", *QUANTITIES.values()), rows)
    return Answer({"table": table}, {"curves": (lambda figure: draw(figure, finished), 8.5)}, numbers)


QUANTITIES = {
    "loss": "training loss",
    "cosine": "cos(D g, H g)",
    "scale": "best multiple of D g",
    "shared": f"shared space of the first {SHARED} eigenvectors",
    "diffusion": "lambda_max(D)",
    "hessian": "lambda_max(H)",
}


def text(interval: Interval) -> str:
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def draw(figure: Any, finished: Finished) -> None:
    """A column for each model; rows: the cosine, the multiple, and the largest eigenvalues."""
    from matplotlib.lines import Line2D

    models = list(dict.fromkeys((each["data"], each["model"]) for each in settings(finished)))
    panels = figure.subplots(3, len(models), sharex=True, sharey="row", squeeze=False)
    for column, (data, model) in zip(panels.T, models, strict=True):
        column[0].set_title(f"{data}, {model}")
        for labels, colour in zip(LABELS, COLOURS, strict=False):
            for axes, names in zip(column, (("cosine",), ("scale",), ("diffusion", "hessian")), strict=True):
                for name in names:
                    values = curves(finished, name, data=data, model=model, labels=labels)
                    style = "--" if name == "hessian" else "-"
                    band(axes, POINTS[: values.shape[1]], values, colour, f"{labels} labels", style)
        column[-1].set_xlabel("step")
        for axes in column:
            axes.set_xscale("symlog", linthresh=20)
            axes.set_xticks(POINTS, [str(step) for step in POINTS])
            axes.minorticks_off()
    for axes, label in zip(
        panels[:, 0], ("cos(D g, H g)", "best multiple of D g for H g", "largest eigenvalue"), strict=True
    ):
        axes.set_ylabel(label)
    for axes in panels[1:].flat:
        axes.set_yscale("log")
    panels[0, 0].legend()
    styles = [Line2D([], [], color="black", linestyle=style, label=name) for name, style in (("D", "-"), ("H", "--"))]
    panels[2, 0].legend(handles=styles)


QUESTION = Question("Is the diffusion matrix close to the Hessian along a training?", plan, run, answer)
