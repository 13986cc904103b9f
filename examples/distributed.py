"""torchrun: several processes train along the RGD direction, and resume from a checkpoint where one of them fails.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # see docs/distributed.md
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed.py --checkpoint run.pt

All step along the direction of the whole batch. Also where a process was killed meanwhile, it prints:

    epoch loss
    1 0.224889
    2 0.254505
"""

import argparse
import gc
import os

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import rgd_ext


def main(epochs: int, checkpoint: str | None) -> None:
    """Train in this process, which torchrun has started with others."""
    distributed.init_process_group("gloo")  # "nccl" for GPUs
    torch.manual_seed(0)
    x = torch.randn(4096, 32)
    y = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 4))(x).argmax(1)  # of a teacher
    loader = DataLoader(TensorDataset(x, y), batch_size=64, sampler=DistributedSampler(x))
    model, done = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4)), 0
    policy, group = rgd_ext.Spectral(0.5, every=16), distributed.group.WORLD
    optimizer = rgd_ext.RGD(model, lr=0.2, momentum=0.9, epsilon=policy, process_group=group)
    if checkpoint and os.path.exists(checkpoint):
        done, of_model, of_optimizer = torch.load(checkpoint)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
    elif distributed.get_rank() == 0:
        print("epoch loss", flush=True)
    for epoch in range(done + 1, epochs + 1):
        loader.sampler.set_epoch(epoch)
        for part, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(part), labels).backward()
            optimizer.step()
        if distributed.get_rank() == 0:
            with torch.no_grad():
                print(f"{epoch} {nn.functional.cross_entropy(model(x), y):.6f}", flush=True)
            if checkpoint:
                torch.save([epoch, model.state_dict(), optimizer.state_dict()], f"{checkpoint}.part")
                os.replace(f"{checkpoint}.part", checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoint")
    main(**vars(parser.parse_args()))
    gc.collect()  # threads of the group end with what refers to it, and have to end before the interpreter
