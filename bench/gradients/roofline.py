"""Achieved bandwidth against the size of G, one panel per dtype, with the measured ceilings.

    python -m bench.gradients.roofline PICTURE.png RECORD.json ...

draws what `python -m bench kernels --json` has recorded, with the ceilings of the first record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..measuring.plots import new_figure, save
from .result import Result

# Role of an arm: its label, colour and marker.
SERIES = {
    "precondition": ("fused", "#0072b2", "o"),
    "compile": ("torch.compile, best", "#009e73", "^"),
    "eager": ("eager, best of three reads", "#e69f00", "s"),
    "naive": ("naive formula", "#d55e00", "v"),
}
CEILINGS = {"read": ("two linear reads, measured", "-"), "copy": ("device copy, measured", "--")}


def draw(results: list[Result], ceilings: dict[str, object], path: str) -> None:
    """Write a PNG."""
    dtypes = list(dict.fromkeys(result.dtype for result in results))
    figure = new_figure(6.2 * len(dtypes), 5.2)
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        shown = sorted((r for r in results if r.dtype == dtype and r.tensors == 1), key=lambda r: r.bytes)
        for role, (label, colour, marker) in SERIES.items():
            points = [(r.bytes, r.bandwidth(r.best(role))) for r in shown if r.best(role)]
            if points:
                panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, alpha=0.8, label=label)
        for name, (label, style) in CEILINGS.items():
            if name in ceilings:
                panel.axhline(ceilings[name], color="black", linestyle=style, linewidth=1, label=label)
        panel.set(xscale="log", yscale="log", title=dtype, xlabel="size of G (bytes)")
        panel.grid(True, which="major", alpha=0.3)
        panel.xaxis.set_minor_formatter("")
        for formatted in panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter:
            formatted("{x:g}")
    panels[0].set_ylabel("(two reads of G + one write) / time (GB/s)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(dtypes) > 1 else 2, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gradients.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("picture", metavar="PICTURE.png")
    parser.add_argument("records", metavar="RECORD.json", type=Path, nargs="+", help="of `bench kernels --json`")
    arguments = parser.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.records]
    results = [Result(**case) for record in records for case in record["cases"]]
    if not results:
        parser.error(
            f"no case was measured in {', '.join(map(str, arguments.records))}: run `bench kernels --json` anew"
        )
    draw(results, records[0]["ceilings"], arguments.picture)


if __name__ == "__main__":
    main()
