"""The bytes that a process hands to collectives.

Of an all-reduce or a broadcast these are the bytes of its tensor, and of an all-gather those of the part of this
process. What travels depends on the algorithm: in a ring of R processes each sends 2 (R - 1) / R times the bytes of an
all-reduce, and R - 1 times its part of an all-gather.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..training.models import loss

# The collectives of rgd_ext/distributed/group.py in a step, each with the place of the payload among its arguments.
COLLECTIVES = {"all_reduce": 0, "all_gather": 1, "broadcast": 0}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Within, the bytes of each kind of collective are counted that is called from Python, as those of RGD are."""
    found = dict.fromkeys(COLLECTIVES, 0)
    functions = {name: getattr(distributed, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            found[name] += args[COLLECTIVES[name]].nbytes
            return functions[name](*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name))
    try:
        yield found
    finally:
        for name, function in functions.items():
            setattr(distributed, name, function)


def of_ddp(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The bytes of a backward with DistributedDataParallel, which calls collectives from C++, by a hook."""
    found = 0

    def hook(state, bucket):  # without annotations, which torch would compare with its own
        nonlocal found
        found += bucket.buffer().nbytes
        work = distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp = DistributedDataParallel(copy.deepcopy(model))
    ddp.register_comm_hook(None, hook)
    loss(ddp(x), y).backward()
    return found


def of_gradient(model: nn.Module) -> int:
    """The bytes of a gradient."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)
