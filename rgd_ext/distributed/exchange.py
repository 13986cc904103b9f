"""What the processes of a group exchange in the backwards of a model, and the checks that they do the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import and_, or_
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._C import _current_graph_task_id

from ..contributions.factor import Factor
from ..contributions.ledger import Contributions
from ..metric import Stats
from .across_ranks import AcrossRanks
from .agreement import first_other
from .blocks import Block, UsedParameters
from .buckets import Layout, digest_of, number_of
from .group import Group, PendingAllGather
from .mean import MeanExchange
from .own_samples import OwnSamples
from .parameters import Comparison, ModelParameters
from .shared_buffers import SharedBuffers

# Of which samples D is the covariance: those of all processes, or those of each process for a direction of its own.
Mode: TypeAlias = Literal["exact", "local"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Per-sample gradients -> the direction, in the order of their parameters, and the statistics that it comes from.
Solve: TypeAlias = Callable[["AcrossRanks | OwnSamples"], tuple[list[Tensor], Stats]]
_DIFFERENT = (
    "{what} of rank {rank} differs from that of rank {other}, so that the processes train different models: let all of"
    " them run the same backwards and optimizer steps, with optimizers of the same state, and load state dicts in all"
    " of them. Nothing was written to .grad; start all processes again from a checkpoint"
)
_NOTHING = Comparison("nothing", lambda: 0)
# On a GPU, whose host would wait for it, parameters are compared in every so many backwards.
_EVERY_ON_GPU = 100
_BITS = 62  # of a word of the mask of parameters
_CHAINED = (
    "one backward goes through two captured models with the same process_group, whose messages would mix: pass each of"
    " them a group of its own, process_group=torch.distributed.new_group(), or capture the whole of both as one model"
)
# For each group the task of autograd's engine in which its last exchange has begun.
_tasks: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Direction(NamedTuple):
    """The direction of several processes.

    Attributes:
        parameters: those that optimizers step, where any process has used them.
        steps: the direction, a tensor (*shape) or a DTensor for each of them.
        stats: the statistics that it comes from; with the mode "local" those of this process, None without samples.
    """

    parameters: list[nn.Parameter]
    steps: list[Tensor]
    stats: Stats | None


class Exchange:
    """The exchanges of one captured model, in which all processes of a group take part.

    A backward has a message at its start, with the number of samples and what has to be equal in all processes; the
    exchanges of gradients; and a message at its end, so that no process writes a direction that another one lacks.

    Args:
        group: the processes.
        mode: "exact" for the direction of the union of all samples; "local" for the mean of the directions of the
            processes, each along its own D.
        parameters: of the captured model.
        token: of `agree`, which tells the captures of a process apart.
        shares_buffers: whether the buffers of the model become those of rank 0 at the end of each backward.

    Attributes:
        group: as given.
        is_exact: whether the mode is "exact".
    """

    def __init__(
        self, group: Group, mode: Mode, parameters: ModelParameters, token: int, shares_buffers: bool = True
    ) -> None:
        self.group, self._parameters, self._token = group, parameters, token
        self._buffers = SharedBuffers(parameters.model if shares_buffers else None)
        self.is_exact = mode == "exact"
        self._number = 0
        self._layouts: list[Layout] = []
        self._header: PendingAllGather
        self._sizes: list[int] = []
        self._compared = _NOTHING
        self._mean_exchange: MeanExchange | None = None
        # How many uses each large parameter had in the last backward, by its id.
        self._use_counts: Counter[int] = Counter()

    @property
    def sends_early(self) -> bool:
        """Whether parts of the mean gradient leave in the midst of the backward."""
        return self.is_exact and not self._parameters.is_sharded

    def begin(self, batch_size: int, what: object) -> None:
        """Begin a backward.

        Args:
            batch_size: the number of samples in this process.
            what: describes what is computed of it, which has to be the same in all processes.

        Raises:
            RuntimeError: if the backward goes through another captured model with the same group.
        """
        self._check_alone()
        layouts = self._parameters.layouts()
        if layouts is not self._layouts:
            self._layouts, self._use_counts = layouts, Counter()
        self._number += 1
        self._sizes = []
        if self.sends_early:
            (layout,) = layouts
            self._mean_exchange = MeanExchange(layout, self.group, self._use_counts, self._await_header)
        self._compared = self._compared_parameter()
        value = self._compared.number()
        numbers = [self._token, self._number, number_of(what), digest_of(layouts), value, batch_size]
        self._header = self.group.start_all_gather("the sizes of batches", numbers)

    def _check_alone(self) -> None:
        """Raise RuntimeError if another model's exchange with the group has begun in this backward.

        Their messages would come in an order that depends on the process.
        """
        task = _current_graph_task_id()
        if task != -1 and _tasks.get(self.group.process_group) == task:
            raise RuntimeError(_CHAINED)
        _tasks[self.group.process_group] = task

    def _compared_parameter(self) -> Comparison:
        """The parameter that is compared in this backward; frozen ones take turns, too."""
        named = self._parameters.stepped()
        place = compared_place(self._number, len(named), all(p.is_cpu for _, p in named))
        return _NOTHING if place is None else self._parameters.compared(*named[place])

    def offer(self, parameter: nn.Parameter, factor: Factor) -> None:
        """Take the contributions of one use of a large parameter, whose mean may leave now."""
        if self._mean_exchange is not None:
            self._mean_exchange.offer(parameter, factor)

    def _await_header(self) -> None:
        """Wait for the message at the start of the backward.

        Raises:
            RuntimeError: in all processes, if they diverge.
        """
        if self._sizes:
            return
        tokens, numbers, whats, digests, compared, sizes = zip(*self._header.numbers(), strict=True)
        for values, what, *groups in (
            (tokens, "the captured model whose backward runs"),
            (numbers, "the number of backwards so far"),
            (whats, "what is computed (the statistics that a rule needs, the vectors of handle.align)"),
            (digests, "the list of trainable parameters"),
            (compared, self._compared.what, self._compared.replica_groups),
        ):
            differing = first_other(values, *groups)
            if differing is not None:
                raise RuntimeError(_DIFFERENT.format(what=what, rank=differing[0], other=differing[1]))
        self._sizes = [*sizes]

    def finish(self, local: Contributions, solve: Solve) -> Direction | None:
        """The direction of all samples; None if there are none.

        Args:
            local: the contributions of this process, which may have none.
            solve: gives the direction and the statistics of per-sample gradients.

        Raises:
            RuntimeError: if a process has failed, or diverges, or the model was sharded otherwise since the capture.
                Then none has a direction.
            ValueError: in all processes, if the Gramian that is needed is too large to be sent.
        """
        self._await_header()
        mean_exchange, self._mean_exchange = self._mean_exchange, None  # memory of two gradients
        if not any(self._sizes) or not any(layout.parameters for layout in self._layouts):
            return None
        self._parameters.restore_stepped()
        flags = self._gather_flags(local, mean_exchange is not None and mean_exchange.send_rest(local))
        found = self._direction(local, mean_exchange, flags, solve)
        self._buffers.share(self.group, flags.buffers)
        # No process goes on before all have the direction.
        self.group.start_all_gather("the end of a backward", [self._number]).wait()
        return found

    def _direction(
        self, local: Contributions, mean_exchange: MeanExchange | None, flags: _Flags, solve: Solve
    ) -> Direction | None:
        if not any(self._sizes):
            for _ in () if mean_exchange is None else mean_exchange.reduced_buckets(flags.is_late):
                pass  # zeros
            return None
        if mean_exchange is not None:
            self._use_counts = mean_exchange.use_counts or self._use_counts
        parts = self._parameters.split(local, self._layouts)
        blocks = [*map(Block, self._layouts, parts)]
        parameters = self._parameters.stepped_of(flags.used.anywhere())
        if self.is_exact:
            means = self._means_of(blocks) if mean_exchange is None else iter([mean_exchange])
            grads = AcrossRanks(blocks, flags.used, self.group, self._sizes, means, flags.is_late)
            return Direction(parameters, *solve(grads))
        own = OwnSamples(blocks, flags.used, self.group)
        return Direction(parameters, *(solve(own) if own.batch_size else (own.combine_nothing(), None)))

    def _means_of(self, blocks: Sequence[Block]) -> Iterator[MeanExchange]:
        """The exchange of the mean of each block, which begins when it is asked for."""
        for block in blocks:
            yield MeanExchange.of(block.layout, self.group, block.local)

    def places_in(self, batch_size: int) -> slice:
        """The places of this process's samples in the statistics of the last backward, which are of so many samples."""
        if not self.is_exact:
            return slice(0, batch_size)
        return self.group.places(self._sizes)

    def _gather_flags(self, local: Contributions, is_late: bool = False) -> _Flags:
        """What all have to know of each process at the end of its backward."""
        own = {id(parameter) for parameter in local.parameters()}
        of_parameters = [id(parameter) in own for layout in self._layouts for parameter in layout.parameters]
        flags = [is_late, *of_parameters, *self._buffers.flags()]
        pieces = [flags[start : start + _BITS] for start in range(0, len(flags), _BITS)]
        words = [sum(bit << place for place, bit in enumerate(piece)) for piece in pieces]
        gathered = self.group.start_all_gather("the parameters that were used", words).numbers()
        with_samples = [each for each, size in zip(gathered, self._sizes, strict=True) if size]

        def joined(masks: list[list[int]], operator: Callable[[int, int], int]) -> list[bool]:
            found = [reduce(operator, each) for each in zip(*masks, strict=True)]
            return [bool(found[place // _BITS] >> place % _BITS & 1) for place in range(len(flags))]

        end = 1 + len(of_parameters)
        # A process without contributions has no samples, as a batch without any has none in `accumulate`.
        of_any = sum(1 << place for place in range(1, end))
        self._sizes = [
            size if _joined_word(words) & of_any else 0 for words, size in zip(gathered, self._sizes, strict=True)
        ]
        anywhere, everywhere = joined(gathered, or_), joined(with_samples, and_)
        return _Flags(anywhere[0], UsedParameters(self._layouts, anywhere[1:end], everywhere[1:end]), anywhere[end:])


class _Flags(NamedTuple):
    """What the processes have told each other at the end of their backwards.

    Attributes:
        is_late: whether a part of the mean came late in any of them.
        used: the parameters that they have used.
        buffers: of `SharedBuffers.flags`, those that are set in any of them.
    """

    is_late: bool
    used: UsedParameters
    buffers: list[bool]


def compared_place(number: int, parameters: int, is_cpu: bool) -> int | None:
    """The place of the parameter that is compared in a backward, turn by turn; None if none is.

    Args:
        number: of the backward.
        parameters: how many there are.
        is_cpu: whether they are in the memory of the host, which would wait for a GPU.
    """
    every = 1 if is_cpu else _EVERY_ON_GPU
    return None if not parameters or number % every else number // every % parameters


def _joined_word(words: list[int]) -> int:
    """The words of a mask as one number."""
    return sum(word << _BITS * place for place, word in enumerate(words))
