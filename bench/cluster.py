"""Predicted steps of SGD and RGD on 8 to 4,096 ranks, by a simulation of what they compute and send; no measurement."""

from __future__ import annotations

from dataclasses import asdict

from .measuring.plots import new_figure, save
from .measuring.report import Record, show
from .simulating.tables import ALGORITHMS, GIGABITS, KINDS, RANKS, REPLICABLE, network, tables
from .simulating.tables import run as step

COLOURS = {400: "#0072b2", 100: "#d55e00", 25: "#444444"}  # by Gbit/s
LINES = {"ring": "-", "tree": "--"}


def draw(path: str) -> None:
    """Write a PNG: RGD / SGD against the number of ranks, for DDP and for FSDP2."""
    figure = new_figure(9, 4)
    model = REPLICABLE[0]
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (kind, methods) in zip(panels, KINDS.items(), strict=True):
        for gigabits in GIGABITS:
            for algorithm in ALGORITHMS:
                nets = [network(ranks, gigabits, algorithm) for ranks in RANKS]
                ratios = [step(methods["RGD"], model, n).seconds / step(methods["SGD"], model, n).seconds for n in nets]
                label = f"{gigabits} Gbit/s, {algorithm}"
                panel.plot(RANKS, ratios, color=COLOURS[gigabits], linestyle=LINES[algorithm], marker="o", label=label)
        panel.set(title=f"{model}, {kind}", xlabel="ranks", xscale="log", xticks=RANKS, xticklabels=map(str, RANKS))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("RGD / SGD (predicted)")
    panels[1].legend(frameon=False)
    save(figure, path)


def run(quick: bool, json: str | None, plot: str | None) -> list[str]:
    """Print the tables, write their numbers and a plot; nothing can fail."""
    record, found = Record(json, "cluster", "simulated"), tables(quick)
    for table in found:
        show(tuple(table.columns), [table.cells()], table.title)
    record.write(tables=[asdict(table) for table in found])
    if plot:
        draw(plot)
    return []
