"""Train along the RGD direction in several processes, and resume from a checkpoint where one of them fails.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed.py --checkpoint run.pt

Each process takes its own part of every batch, and all of them step along the direction of the whole batch. The first
process writes a checkpoint after each epoch, and prints a table of loss and accuracy on the training data. Where a
process fails, torchrun starts all of them again, and they resume from the checkpoint along the same trajectory.
(Without the variable, the processes would look for each other at the addresses from before the failure: PyTorch's issue
135712.) The data, of a teacher network, are made by the program.
"""

import argparse
import gc
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import rgd_ext


def network(width: int) -> nn.Sequential:
    """An MLP from 32 numbers to 4 classes."""
    return nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 4))


def main() -> None:
    """Train in this process, which torchrun has started with others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="resume from this file, if it is there, and write it")
    arguments = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    is_first = distributed.get_rank() == 0

    torch.manual_seed(0)
    x = torch.randn(4096, 32)
    with torch.no_grad():
        y = network(256)(x).argmax(1)
    data = TensorDataset(x.to(device), y.to(device))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler)

    model, done = network(64).to(device), 0
    policy = rgd_ext.Spectral(0.5, every=16)
    optimizer = rgd_ext.RGD(model, lr=0.2, momentum=0.9, epsilon=policy, process_group=distributed.group.WORLD)
    if arguments.checkpoint and arguments.checkpoint.exists():
        state = torch.load(arguments.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["epoch"]
    elif is_first:
        print("epoch loss accuracy", flush=True)

    for epoch in range(done + 1, arguments.epochs + 1):
        sampler.set_epoch(epoch)
        for part, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(part), labels).backward()
            optimizer.step()
        if is_first:
            with torch.no_grad():
                outputs = model(data.tensors[0])
            loss, accuracy = cross_entropy(outputs, data.tensors[1]), (outputs.argmax(1) == data.tensors[1]).float()
            print(f"{epoch} {loss:.6f} {accuracy.mean():.2%}", flush=True)
            if arguments.checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, f"{arguments.checkpoint}.part")
                os.replace(f"{arguments.checkpoint}.part", arguments.checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    # The model and the optimizer refer to the process group. Without it, its threads end before the interpreter does.
    gc.collect()
