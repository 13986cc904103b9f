"""What the processes of a group have to agree on before they train a model together."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ..bits import flat_bits
from .group import Group
from .sharding import is_dtensor

# The address in the representation of a function, which no two processes share.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Of at most 32 bits: a change of the highest one of 64 would be lost in a product with an even factor.
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def agree(group: Group, model: nn.Module, options: Mapping[str, object]) -> int:
    """Check that all processes capture the same model alike, and give them the parameters and buffers of rank 0.

    Shards of parameters stay as they are.

    Args:
        group: the processes.
        model: the model.
        options: what has to be equal besides, by what it is called in an error.

    Returns:
        A random number, the same in all processes.

    Raises:
        ValueError: in all processes, if something differs; no parameter has changed then.
        RuntimeError: if a process does not come to this call, or the state of rank 0 does not arrive.
    """
    parameters = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad, str(getattr(p, "placements", "whole")))
        for name, p in model.named_parameters()
    ]
    buffers = [(name, tuple(b.shape), str(b.dtype)) for name, b in model.named_buffers()]
    modules = [(name, f"{type(m).__module__}.{type(m).__qualname__}") for name, m in model.named_modules()]
    token = _check_equal(
        group, {"the parameters": parameters, "the buffers": buffers, "the modules": modules, **options}
    )
    _share_state(group, model)
    return token


def _check_equal(group: Group, items: Mapping[str, object]) -> int:
    """Raise ValueError if an item differs between the processes. Returns a random number of rank 0."""
    shown = {name: _shown(value if isinstance(value, list) else [value]) for name, value in items.items()}
    digests = {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in shown.items()}
    gathered = group.all_gather_objects("the options of the capture", (digests, secrets.randbits(62)))
    found, tokens = zip(*gathered, strict=True)
    for name in items:
        other = first_other([each.get(name) for each in found])
        if other is not None:
            lines = group.all_gather_objects(f"what differs in {name}", shown[name])
            pairs = zip_longest(*(lines[rank] for rank in other), fillvalue="nothing more")
            one, another = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"{name} of rank {other[0]} and of rank {other[1]} differ ({one[:300]} and {another[:300]}): capture"
                " the same model with the same options in all processes of the group"
            )
    return tokens[0]


def _shown(values: Sequence[object]) -> list[str]:
    """A line for each value, without addresses."""
    return [_ADDRESS.sub("", repr(value)) for value in values]


def _share_state(group: Group, model: nn.Module) -> None:
    """Overwrite the parameters and buffers by those of rank 0, and check that they are equal afterwards."""
    named = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not is_dtensor(tensor)  # a shard differs from those of others
    }
    group.broadcast("the parameters of rank 0", [*named.values()])
    found = group.all_gather_objects("checksums of the parameters", [checksum(tensor) for tensor in named.values()])
    for place, name in enumerate(named):
        other = first_other([each[place] for each in found])
        if other is not None:
            raise RuntimeError(f"'{name}' of rank {other[0]} differs from that of rank {other[1]} after a broadcast")


def first_other(values: Sequence[object], groups: Sequence[int] = ()) -> tuple[int, int] | None:
    """The first rank whose value differs from that of an earlier one, and that one; None if all are equal.

    Args:
        values: of the ranks.
        groups: a number for each rank; only ranks with the same one have to have equal values. By default all.
    """
    first: dict[int, int] = {}
    for rank, group in enumerate(groups or [0] * len(values)):
        other = first.setdefault(group, rank)
        if values[rank] != values[other]:
            return rank, other
    return None


def checksum(tensor: Tensor) -> int:
    """A number of the bits of a tensor, which differs if some differ; not by the order of a summation."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach())
    numbers = flat_bits(tensor, _WIDTHS[tensor.itemsize])
    # The places of a row have factors of their own, so that changes of several elements hardly cancel.
    factors = _factors(tensor.device)
    rows = len(numbers) // len(factors)
    head, tail = numbers[: rows * len(factors)], numbers[rows * len(factors) :]
    sums = head.view(rows, len(factors)).sum(0, dtype=torch.int64)
    sums[: len(tail)] += tail
    return int((sums * factors).sum())


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << 62, (4096,), generator=generator).to(device)
