"""Records of benchmarks in the folder of a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def records(folder: Path, benchmark: str) -> list[dict]:
    """What `--json` wrote to BENCHMARK.json and BENCHMARK-*.json.

    Raises:
        ValueError: if there is no such file.
    """
    found = [path for path in sorted(folder.glob("*.json")) if path.stem.partition("-")[0] == benchmark]
    if not found:
        path = folder / f"{benchmark}.json"
        raise ValueError(f"{path} is missing: `python -m bench {benchmark} --json {path}` makes it")
    return [json.loads(path.read_text()) for path in found]


def chosen(results: Sequence[dict], key: str, only: Sequence[str]) -> list[dict]:
    """The results with one of the texts in the name under `key`, in the order of the texts.

    Raises:
        ValueError: if a text is in no name.
    """
    for text in only:
        if not any(text in result[key] for result in results):
            raise ValueError(f"no case has {text!r} in its name: {'; '.join(result[key] for result in results)}")
    return [result for text in only for result in results if text in result[key]]
