"""Clocks of what all processes do at the same time."""

from __future__ import annotations

from collections.abc import Callable

from ..measuring.timing import Clock, host_clock, synchronize
from .processes import Member


def clock(member: Member, call: Callable[[], object], calls: int, settles: bool = True) -> Clock:
    """A clock of consecutive calls, which all processes begin together; milliseconds per call in this process.

    Args:
        member: this process.
        call: what is timed.
        calls: how many times.
        settles: whether one more call comes before, which is not timed.
    """
    wait = synchronize(member.device)

    def settle() -> None:
        if settles:
            call()
        wait()
        member.wait()

    def repeat() -> None:
        for _ in range(calls):
            call()

    return host_clock(repeat, calls, wait, settle)


def slowest(member: Member, clock: Clock) -> Clock:
    """A clock of the process that takes longest, with the same time in all of them."""
    return lambda: member.largest(clock())
