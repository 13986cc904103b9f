"""timm: small variants of its models are verified and trained along the RGD direction.

    python examples/timm_models.py     # needs timm and torchvision

It prints the largest relative error of the per-sample gradients that are verified, and losses:

    model                     parameters     error  first-loss   last-loss
    vit_tiny_patch16_224           32356   1.9e-06      1.3678      0.0518
    deit3_small_patch16_224        32452   1.4e-06      1.3863      0.0803
    cait_xxs24_224                 58012   1.8e-06      1.3890      0.1462
    convnext_atto                  25892   9.1e-07      1.3582      0.0831
    resnet18                      380356   5.1e-05      1.5571      1.0130
"""

import argparse

import timm
import torch
from torch.nn.functional import cross_entropy

import rgd_ext

TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "vit_tiny_patch16_224": TRANSFORMER,
    "deit3_small_patch16_224": TRANSFORMER,
    "cait_xxs24_224": TRANSFORMER,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet18": {"norm_layer": "groupnorm", "channels": (32, 32, 64, 64)},
}

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
steps = parser.parse_args().steps
torch.manual_seed(0)
colours = torch.randn(4, 3, 1, 1)  # of four classes of noisy images
print(f"{'model':<24}{'parameters':>12}{'error':>10}{'first-loss':>12}{'last-loss':>12}")
for name, options in MODELS.items():
    model = timm.create_model(name, num_classes=4, **options)
    handle = rgd_ext.precondition(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for y in torch.randint(4, (steps, 32)):
        x = colours[y] + torch.randn(32, 3, 32, 32)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()  # the direction is in .grad
        optimizer.step()
        losses.append(loss.item())
    handle.remove()
    report = rgd_ext.verify(model, x)
    size = sum(p.numel() for p in model.parameters())
    print(f"{name:<24}{size:>12}{report.largest_error:>10.1e}{losses[0]:>12.4f}{losses[-1]:>12.4f}", flush=True)
