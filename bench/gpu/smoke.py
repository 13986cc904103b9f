"""Compares every operator with float64 in all dtypes, each in its own process, so that a crash ends no other check.

`python -m bench.gpu.smoke [DEVICE [OPERATOR]]` checks one operator, by default all of them on cuda. Each result is
printed as soon as it is known.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from ..measuring.agreement import TOLERANCE, error
from ..measuring.inputs import dtype_name, random
from .operator_inputs import DTYPES, INPUTS, call, exact

BATCH_SIZES = (3, 8, 130)
SHAPES = ((3, 5), (1,), (129,), (1031,))


def check(name: str, device: str) -> list[str]:
    """Run an operator and print a line for each dtype and batch size; returns the lines of wrong results."""
    torch.backends.cudnn.allow_tf32 = False
    wrong = []
    for dtype in DTYPES:
        for batch_size in BATCH_SIZES:
            torch.manual_seed(0)
            grads = [random((batch_size, *shape), dtype).to(device) for shape in SHAPES]
            arguments = INPUTS[name](grads)
            want = exact(name, arguments)
            found = error(_on_cpu(call(name, arguments)), want)
            outcome = "ok" if found < TOLERANCE[dtype] else "WRONG"
            line = f"{name}, {dtype_name(dtype)}, B = {batch_size}: {outcome}, error {found:.1e}"
            print(line, flush=True)
            wrong += [line] * (outcome != "ok")
    return wrong


def _on_cpu(result: object) -> object:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, result)


def in_own_process(name: str, device: str) -> str | None:
    """Check an operator in a new process; returns how that failed, or None."""
    status = subprocess.run([sys.executable, "-m", "bench.gpu.smoke", device, name], check=False).returncode
    return None if status == 0 else f"{name}: " + (f"exit status {status}" if status > 0 else f"signal {-status}")


def check_all(device: str) -> list[str]:
    """Check all operators in parallel; returns the failures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {name: pool.submit(in_own_process, name, device) for name in INPUTS}
        try:
            return [wrong for future in found.values() if (wrong := future.result())]
        except KeyboardInterrupt:
            late = [name for name, future in found.items() if not future.done()]
            pool.shutdown(cancel_futures=True)  # the interrupt reaches the running checks as well
            return [f"not finished: {', '.join(late)}"]


if __name__ == "__main__":
    where, *names = sys.argv[1:] or ["cuda"]
    failures = check(names[0], where) if names else check_all(where)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))
