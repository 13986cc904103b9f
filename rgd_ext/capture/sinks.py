"""What a backward through a captured model is for: to write the direction, to be collected, or to show its shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import ops
from ..contributions.buffers import Workspace, fresh
from ..contributions.factor import Dense, Factor, blank
from ..contributions.itemised import Item, ItemisedContributions
from ..contributions.ledger import Contributions
from ..contributions.merge import added_up, is_added_up, sum_uses
from ..contributions.outline import Outline
from ..distributed import AcrossRanks, Exchange, OwnSamples, is_dtensor, is_large
from ..gradients import squared_norm
from ..metric import ParameterVector, PerParameter, Solver, Stats
from ..planning.planner import Planner
from .grad_writer import GradWriter
from .parameters import UNKNOWN, WatchedParameters
from .precision import full_precision

# The numbers of the calls of the model that a backward goes through, each with its number of samples.
CallNumbers: TypeAlias = set[tuple[int, int]]
_HOST = torch.device("cpu")


class Sink(ABC):
    """What a backward is for.

    Args:
        planner: chooses the strategies.
        parameters: the parameters of the model.

    Attributes:
        writes: whether `.grad` changes at the end of the backward.
        keeps_contributions: whether the contributions are kept after the backward, so that tensors that the user may
            change meanwhile have to be copied.
        sends_early: whether contributions to some parameters are to be offered as soon as they are there.
    """

    writes = False
    keeps_contributions = False
    sends_early = False

    def __init__(self, planner: Planner, parameters: WatchedParameters) -> None:
        self._planner, self._parameters = planner, parameters

    def begin(self, batch_size: int) -> None:
        """Begin a backward with so many samples."""
        self._planner.begin()

    @abstractmethod
    def apply(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        """Apply the strategy that is chosen for the contributions of one use of a parameter."""

    def total(self, parameter: nn.Parameter, factors: list[Factor]) -> Factor:
        """Apply the strategy that is chosen for the sum of the contributions of several uses of a parameter."""
        return self.apply(parameter, sum_uses(factors))

    def takes_early(self, parameter: nn.Parameter) -> bool:
        """Whether contributions to the parameter are to be offered."""
        return False

    def offer(self, parameter: nn.Parameter, factor: Factor) -> None:  # noqa: B027
        """Take note of the contributions of one use of such a parameter, in the midst of the backward."""

    @abstractmethod
    def finish(self, contributions: Contributions, passed: CallNumbers) -> None:
        """End a backward.

        Args:
            contributions: what the layers have contributed.
            passed: the calls of the model that the backward went through, if they are kept.
        """

    def _close(self, contributions: Contributions, needs_gram: bool) -> None:
        contributions.close(self.total)
        if contributions:  # else a module's output was used, but none of its parameters had a part in it
            self._planner.finish(partial(_named, self._parameters, contributions.outline()), needs_gram)


def _named(parameters: WatchedParameters, outline: Outline) -> list[tuple[str, Factor]]:
    # This is a function, since the planner keeps it: a method would keep the sink, and with it what that has collected.
    return [(parameters.name_of(parameter), factor) for parameter, factor in outline.factors()]


class WriteDirection(Sink):
    """Adds the direction to `.grad`.

    Args:
        solver: computes the direction.
        planner, parameters: as for `Sink`.
        workspace: the memory for gradients that a strategy forms.
        per_parameter: whether to compute `Stats.per_parameter`.
        exchange: with the other processes that train the model, if there are any.
        vector: v of `Stats.aligned`, by the names of parameters, since parameters may be replaced.

    Attributes:
        solver, per_parameter, exchange: as given.
        stats: `Stats` of the last direction, or None before the first.
    """

    writes = True

    def __init__(
        self,
        solver: Solver,
        planner: Planner,
        parameters: WatchedParameters,
        workspace: Workspace,
        per_parameter: bool = False,
        exchange: Exchange | None = None,
        vector: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(planner, parameters)
        self.solver, self._workspace, self._vector = solver, workspace, vector
        self.per_parameter, self.exchange = per_parameter, exchange
        self._needs_gram = True
        self._grad_writer = GradWriter(solver.rule.is_additive)
        self.stats: Stats | None = None

    def begin(self, batch_size: int) -> None:
        super().begin(batch_size)
        self._start(batch_size)

    def _start(self, batch_size: int) -> None:
        self._needs_gram = self.solver.needs_gram
        self._workspace.restart()
        if self.exchange is not None:
            vector = sorted((name, is_dtensor(part)) for name, part in (self._vector or {}).items())
            self.exchange.begin(batch_size, (self._needs_gram, self._vector is None, vector))

    @property
    def sends_early(self) -> bool:  # type: ignore[override]  # others have a constant
        return self.exchange is not None and self.exchange.sends_early

    def takes_early(self, parameter: nn.Parameter) -> bool:
        return self.sends_early and is_large(parameter)

    def offer(self, parameter: nn.Parameter, factor: Factor) -> None:
        if self.exchange is not None:
            self.exchange.offer(parameter, factor)

    @property
    def _forms_gram(self) -> bool:
        """Whether the Gramian of this process's samples is formed."""
        is_union = self.exchange is not None and self.exchange.is_exact
        return self._needs_gram and not (is_union and self.solver.rule.eigenvalue_method == "lanczos")

    def apply(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        name = self._parameters.name_of(parameter)
        return self._planner.apply(name, factor, self._forms_gram, self._workspace.empty)

    def finish(self, contributions: Contributions, passed: CallNumbers) -> None:
        self._close(contributions, self._forms_gram)
        if contributions or self.exchange is not None:
            self.write(contributions)

    def finish_union(self, batch_size: int, joined: Iterable[tuple[nn.Parameter, Factor]]) -> None:
        """Add the direction of a union of batches to `.grad`.

        Args:
            batch_size: the number of samples in the union.
            joined: each parameter and its contributions.
        """
        self._start(batch_size)
        contributions = Contributions(batch_size)
        for parameter, factor in joined:
            name = self._parameters.name_of(parameter)
            # Planned for the Gramian, as when they were collected.
            contributions.add_factor(parameter, self._planner.apply(name, factor, True, self._workspace.empty))
        contributions.close(self.total)
        self.write(contributions)

    @torch.no_grad()
    def write(self, contributions: Contributions) -> None:
        """Add the direction to `.grad`. The contributions are used up.

        Raises:
            ValueError: for gradient hooks on parameters.
            RuntimeError: if the exchange with other processes fails.
        """
        parameters = contributions.parameters()
        self._parameters.check_unhooked(parameters)
        if self.per_parameter:
            contributions = ItemisedContributions(contributions)
        device = parameters[0].device if parameters else _HOST
        with full_precision(device), self._workspace.reading():
            if self.exchange is None:
                direction, self.stats = self._solve(contributions)
            else:
                found = self.exchange.finish(contributions, self._solve)
                parameters, direction, self.stats = found or ([], [], None)
        self._grad_writer.add(parameters, direction)
        self._workspace.release()

    def _solve(self, grads: Contributions | AcrossRanks | OwnSamples) -> tuple[list[Tensor], Stats]:
        """The direction of these gradients, in the order of their parameters, and the statistics that it comes from."""

        def align(vectors: ParameterVector) -> Tensor:
            return grads.align_by_parameter(self._parameters.vector(vectors))

        parameters = grads.parameters()
        vector = self._own_vector(parameters)
        aligned = None if vector is None else grads.align_by_parameter(vector)
        direction, stats = self.solver.solve(grads.release(), self._needs_gram, align, aligned)
        if self.per_parameter:
            steps = dict(zip(parameters, direction, strict=True))
            items = grads.items(lambda p: squared_norm([steps[p]]))  # type: ignore[union-attr]  # see `write`
            stats.attach(PerParameter(stats.batch_size, self._by_name(items)))
        return direction, stats

    def _by_name(self, items: dict[nn.Parameter, Item]) -> dict[str, Item]:
        """The items by the names of parameters in the model; those of replaced ones come last."""
        named = [(self._parameters.name_of(parameter), item) for parameter, item in items.items()]
        gone = iter(range(len(named)))
        named = [(f"(replaced {next(gone)})" if name == UNKNOWN else name, item) for name, item in named]
        return dict(self._parameters.in_model_order(named, lambda pair: pair[0]))

    def _own_vector(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor] | None:
        """The parts of the vector that belong to these parameters, which may have been replaced or converted since."""
        if self._vector is None:
            return None
        found = {}
        for parameter, like in zip(parameters, self._parameters.stepped_of(parameters), strict=True):
            name = self._parameters.name_of(parameter)
            if name in self._vector:
                part = self._vector[name].to(like)
                ops.check_vector(f"the vector of parameter '{name}' in handle.align", part, like.shape, like)
                found[parameter] = part
        return found

    def align(self, vectors: ParameterVector | None) -> None:
        """From now on `Stats.aligned` are the products with a vector that a user passes, or None for None.

        Raises:
            ValueError, TypeError: if it does not match the parameters.
        """
        if vectors is None:
            self._vector = None
            return
        # Copies: a gradient that was passed may change in the next backward.
        parts = self._parameters.vector(vectors).items()
        self._vector = {self._parameters.name_of(parameter): part.clone() for parameter, part in parts}

    def rehearsal(self) -> WriteDirection:
        """A sink that does the same work, for timings, and of which nothing is remembered."""
        solver = self.solver.rehearsal()
        return WriteDirection(
            solver, self._planner, self._parameters, self._workspace, self.per_parameter, None, self._vector
        )

    def clear(self) -> None:
        """Free the memory for gradients."""
        self._workspace.clear()


class HandOver(Sink):
    """Hands the contributions over, and leaves `.grad` as it is.

    Args:
        take: called with the contributions of each backward, and the calls of the model that it went through.
        planner, parameters: as for `Sink`.
        keeps_contributions: as for `Sink`.
    """

    def __init__(
        self,
        take: Callable[[Contributions, CallNumbers], None],
        planner: Planner,
        parameters: WatchedParameters,
        keeps_contributions: bool,
    ) -> None:
        super().__init__(planner, parameters)
        self._take, self.keeps_contributions = take, keeps_contributions

    def apply(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        # Planned for the Gramian: these contributions may be asked for any statistic.
        return self._planner.apply(self._parameters.name_of(parameter), factor, True, fresh)

    def finish(self, contributions: Contributions, passed: CallNumbers) -> None:
        self._close(contributions, needs_gram=True)
        if contributions:
            self._take(contributions, passed)


class Refusal(Sink):
    """Refuses backwards.

    Args:
        message: what the RuntimeError says.
        planner, parameters: as for `Sink`.
    """

    def __init__(self, message: str, planner: Planner, parameters: WatchedParameters) -> None:
        super().__init__(planner, parameters)
        self._message = message

    def begin(self, batch_size: int) -> None:
        raise RuntimeError(self._message)

    def apply(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        return factor

    def finish(self, contributions: Contributions, passed: CallNumbers) -> None:
        """There is no backward to end."""


class NoteShapes(Sink):
    """Lets the planner choose the strategies, and forms no gradients.

    Args:
        needs_gram: whether the statistics include the Gramian.
        planner, parameters: as for `Sink`.
    """

    def __init__(self, needs_gram: bool, planner: Planner, parameters: WatchedParameters) -> None:
        super().__init__(planner, parameters)
        self._needs_gram = needs_gram

    def apply(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        formed = blank(factor.example, factor.batch_size, *parameter.shape)
        return Dense(formed) if self._strategy(parameter, factor) == "materialise" else factor

    def total(self, parameter: nn.Parameter, factors: list[Factor]) -> Factor:
        # How uses are added up depends on the forms that their strategies work on.
        forms = [factor.apply(self._strategy(parameter, factor), fresh) for factor in factors]
        if not is_added_up(forms):
            return super().total(parameter, forms)
        return self.apply(parameter, added_up(blank(forms[0].example, forms[0].batch_size, *parameter.shape)))

    def _strategy(self, parameter: nn.Parameter, factor: Factor) -> str:
        return self._planner.note(self._parameters.name_of(parameter), factor, self._needs_gram).strategy

    def finish(self, contributions: Contributions, passed: CallNumbers) -> None:
        self._close(contributions, self._needs_gram)
