"""What the tests of the monitor and of its figure have in common."""

import torch

from rgd_ext import monitor

HEADER = ",".join(monitor.COLUMNS) + "\n"


def backward(model, batch=8):
    model.zero_grad()
    loss = model(torch.randn(batch, 6, dtype=torch.float64)).square().mean()
    loss.backward()
    return loss


def write(path, *steps, **cells):
    cells = {"batch_size": 8, **cells}
    rows = [",".join(str(cells.get(name, step)) for name in monitor.COLUMNS) + "\n" for step in steps]
    path.write_text(HEADER + "".join(rows))
