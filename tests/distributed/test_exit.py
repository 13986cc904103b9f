"""What is left of a process group at the end of a training, whose threads may abort an exiting interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

PROGRAM = """
import gc, sys
from pathlib import Path
import torch
import rgd_ext

def threads():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)

def train():
    model = torch.nn.Linear(4, 2)
    optimizer = rgd_ext.RGD(model, lr=0.1, process_group=torch.distributed.group.WORLD)
    model(torch.randn(8, 4)).square().sum(1).mean().backward()
    optimizer.step()

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
train()
print(threads())
torch.distributed.destroy_process_group()
gc.collect()
print(threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to find threads")
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
def test_threads_end_with_the_group_and_the_optimizer(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, found.stdout.split())
    assert before > 0
    assert after == 0
