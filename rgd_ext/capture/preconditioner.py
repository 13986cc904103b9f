"""The handle of a captured model: collects contributions during a backward, writes the direction at its end."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _functorch
from torch.nn.parallel import DistributedDataParallel

from .._binary import _C
from ..metric import Fixed, Inverse, LargestEigenvalue, Policy, Spectral, Stats, checked_policy, needs_gram, solve
from .aside import Aside
from .batch import AS_UNIT, Batch, check_not_empty, is_list, modules_in, tensors_in
from .calls import Calls
from .captured import CapturedGradients
from .dry_run import dry_run
from .embedding import Rows
from .factors import Factor, Outer
from .install import check_model, taps_for
from .nodes import Contributions, Record, Wanted
from .plan import Plan, plan_of
from .planner import Choice, Planner
from .precision import full_precision
from .runs import Call
from .shared import Shared
from .small import SmallLayers
from .sums import add
from .taps import Tap
from .unions import DEFERRED, INSIDE_BLOCK, LOST, NESTED_BLOCKS, NOT_DEFERRED, BatchUnion, Contributed, Passed
from .verifier import Verifier
from .workspace import LITTLE, Workspace, fresh
from .wrappers import check_not_in_ddp, check_not_sharded, check_not_wrapped

NESTED = (
    "a backward through the captured model ran inside another one, from a hook or an autograd function: it took the"
    " place of the outer one, whose direction is lost. Run them one after the other, or the forward and the backward of"
    " one under `with handle.paused():`"
)
SECOND_DERIVATIVE = (
    "create_graph=True through a captured model: directions have no derivative, and the gradient of a gradient does not"
    " reach the parameters. Run the forward and the backward, or the whole gradient penalty, under"
    " `with handle.paused():`"
)
RETURNED_GRADIENT = (
    "torch.autograd.grad with respect to parameters of a captured model: their gradient is not formed. Run the forward"
    " and torch.autograd.grad under `with handle.paused():`"
)
# (parameter, callable) -> a hook that `remove` takes away; whether Python's list of hooks has it.
_guard, _HOOKS = (Tensor.register_hook, 1) if _C is None else (_C.Guard, 0)
_live: weakref.WeakSet[Preconditioner] = weakref.WeakSet()


class Preconditioner:
    """The handle of a captured model, from `rgd_ext.precondition`; a context manager that removes the capture.

    Attributes:
        stats: `Stats` of the last direction, or None before the first.
        batch_dim: the dimension of the samples in the model's inputs, or None where each call is for one sample.
        batch: of the call of the model under way, or None.
        batch_size: of the call before.
        calls_begun: how many calls of the model, or of parts of it, there were.
        aside: of the backward under way, what can be had in one way only.
        small: of the backward under way, small layers.
        verifier: of calls of the model.
        modules: of the model when it was captured.
        owner: a weak reference to the `RGD` that made the capture, which ends with a new capture of the model; or None.
        guards: by its id, every trainable parameter and the hook that notices gradients past the taps. By id because
            the hash of a tensor is a call of Python.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        inverse: Inverse,
        batch_norm: Literal["error", "contribution"],
        memory_budget: float | None = None,
        verify: bool = True,
        batch_dim: int | None = 0,
    ) -> None:
        self.model, self.batch_norm, self.batch_dim = model, batch_norm, batch_dim
        self.verifier = Verifier(self, verify)
        self.stats: Stats | None = None
        self._policy, self._inverse = policy, inverse
        every = getattr(policy, "every", 1)
        self._largest = LargestEigenvalue(every) if every > 1 else None
        self._pauses = 0
        self._removed = False
        self.batch: Batch | None = None
        self.batch_size: int | None = None
        self.calls_begun = 0
        self.guards: dict[int, tuple[nn.Parameter, object]] = {}
        self._names = {p: name for name, p in model.named_parameters()}
        # Of the backward under way: its id, its batch size and each parameter's contributions.
        self._task = -1
        # Of backwards that had not ended when another one began: as a rule they failed.
        self._unfinished: set[int] = set()
        self._size: int | None = None
        self._with_gram = True
        self._factors: dict[nn.Parameter, list[Factor]] = {}
        self.aside = Aside()
        # The calls that the backward under way goes through, if what it contributes is collected.
        self._passed: Passed = set()
        self._union: BatchUnion | None = None
        # Of backwards that write nothing, where their contributions go.
        self._take: Callable[[Contributed, Passed], None] | None = None
        self._planner = Planner(memory_budget)
        self._choices: list[Choice] = []
        self._workspace = Workspace(LITTLE if memory_budget in (None, math.inf) else 0)
        self.small = SmallLayers(self._workspace.kept)
        self._is_dry = False
        self._calls = Calls()
        self.modules = modules_in(model)
        self.owner: weakref.ref[torch.optim.Optimizer] | None = None
        self._taps = taps_for(self, model)
        # Where captured parameters are: others may come in their places.
        self._slots = {(owner, key) for tap in self._taps for owner, key, _ in tap.slots}
        for tap in self._taps:
            tap.install()
        for parameter in filter(lambda p: p.requires_grad and p.numel(), self._names):
            self.guard(parameter)
        _live.add(self)

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self._taps)} modules"
        return f"Preconditioner({type(self.model).__name__}, {state}, {self._policy}, inverse={self._inverse!r})"

    def __enter__(self) -> Preconditioner:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __reduce__(self):
        # A copy of a model is not captured: where the model keeps its handle, the copy has None.
        return type(None), ()

    def remove(self) -> None:
        """Leave the model as it was found. Gradients already written stay; what `defer` has collected is dropped."""
        for tap in self._taps:
            tap.uninstall()  # where somebody has wrapped it since, a removed capture's tap lets everything through
        for _, hook in self.guards.values():
            hook.remove()
        self._taps, self.guards, self._removed = [], {}, True
        self._factors, self.aside = {}, Aside()  # of a backward that failed
        self._union = self._take = None
        self.small.clear()
        self._workspace = Workspace()
        _live.discard(self)

    def give_way(self) -> None:
        """Leave the model to a new capture: the owner, whose parameters get the directions of that, steps no more."""
        owner = self.owner()
        self.remove()
        if owner is not None:
            owner.register_step_pre_hook(_refuse_step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ordinary autograd for a while: forwards and backwards inside give plain gradients.

        For gradient penalties, `torch.autograd.grad` and second derivatives. Forward and backward both belong inside.
        """
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """One direction for the union of the batches of all backwards inside, written when the block ends.

        The gradient is that of the sum of the losses, as in gradient accumulation; the batches may differ in size.
        Backwards through one call of the model are of the same samples, whose contributions add up; others are of
        samples of their own. Each backward's contributions are kept until then. Nothing is written if the block raises.

        Raises:
            RuntimeError: if blocks are nested, or the handle defers. Inside also from a backward that ties samples
                which were separate before, and from the step of an optimizer along the direction that is to be written.
        """
        if self._union is not None:
            raise RuntimeError(DEFERRED if self._union.is_deferred else NESTED_BLOCKS)
        self._union = union = BatchUnion(is_deferred=False)
        try:
            with self._given_to(union.add):
                yield
        finally:
            self._union = None
        self._write_union(union)

    def defer(self, on: bool = True) -> None:
        """From now on backwards only collect, as inside of `accumulate`; `write` writes the direction of their union.

        For trainers, which run the backwards and the step. It stays on until `defer(False)`. What backwards contribute
        is kept until it is written; meanwhile steps of optimizers of the model's parameters raise a RuntimeError and
        change nothing, provided that they are a `torch.optim.Optimizer`: others would step without the direction.
        `RGD.zero_grad` drops what is collected; before the zero_grad of other optimizers, or of the model, use `drop`
        if a step is left out.

        Raises:
            RuntimeError: inside of `accumulate`, or if what was collected would be lost by `defer(False)`.
        """
        if self._union is not None and not self._union.is_deferred:
            raise RuntimeError(INSIDE_BLOCK)
        if self._union and not on:
            raise RuntimeError(LOST)
        if on != (self._union is not None):
            self._union = BatchUnion(is_deferred=True) if on else None
            self._take = self._union.add if on else None

    def write(self) -> None:
        """Add the direction of the union of all batches since the last `write` to `.grad`, with `defer` on.

        Call it before the optimizer's step, and before gradients are clipped or unscaled. If nothing was collected, as
        where a trainer has skipped its batches, nothing happens.

        Raises:
            RuntimeError: if the handle does not defer.
            ValueError: for gradient hooks on parameters.
        """
        if self._union is None or not self._union.is_deferred:
            raise RuntimeError(NOT_DEFERRED if self._union is None else INSIDE_BLOCK)
        self._write_union(self._union)

    def drop(self) -> None:
        """Forget the backwards that `defer` or `accumulate` has collected since the last direction."""
        if self._union is not None:
            self._union.drop()

    def _write_union(self, union: BatchUnion) -> None:
        parameters = union.parameters()
        if not parameters:
            return
        self._check_unhooked(parameters)
        factors = [self._settled(*each) for each in union.joined()]
        gradients = CapturedGradients(factors, releases=True)
        del factors  # as in `_finish`
        self._write(parameters, gradients)

    @contextmanager
    def _given_to(self, take: Callable[[Contributed, Passed], None]) -> Iterator[None]:
        """Backwards inside hand over what they contribute, and write nothing."""
        outer, self._take = self._take, take
        try:
            yield
        finally:
            self._take = outer

    @contextmanager
    def collect(self) -> Iterator[list[Contributed]]:
        """Backwards inside add their contributions to the list this yields, and write nothing."""
        parts: list[Contributed] = []
        with self._given_to(lambda part, calls: parts.append(part)):
            yield parts

    @contextmanager
    def trial(self) -> Iterator[list[Contributed]]:
        """`collect`, and nothing is remembered of the backwards inside."""
        saved = self._planner, self._choices
        self._planner = Planner(self._planner.budget)
        try:
            with self.collect() as parts:
                yield parts
        finally:
            self._planner, self._choices = saved

    def state_dict(self) -> dict[str, dict]:
        """What later directions depend on besides the parameters, for a training that is resumed.

        It is the memory of `Spectral(every=...)`, and empty for other policies. `RGD.state_dict` contains it.
        """
        return {} if self._largest is None else {"largest_eigenvalue": self._largest.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from where `state_dict` was called; an empty dict lets the policy begin anew, and others ignore it.

        Raises:
            ValueError: if `state` is not from the `state_dict` of a handle; nothing is changed then.
        """
        if not isinstance(state, dict) or not state.keys() <= {"largest_eigenvalue"}:
            raise ValueError(
                f"a handle has no state {state!r}: pass what its state_dict() gave, which the state_dict() of RGD"
                " has under 'preconditioner'"
            )
        if self._largest is not None:
            largest = LargestEigenvalue(self._largest.every)
            if state:
                largest.load_state_dict(state["largest_eigenvalue"])
            self._largest = largest

    def is_collecting(self) -> bool:
        """Whether what backwards contribute outlives them, and the tensors that the user changes afterwards."""
        return self._take is not None and not self.verifier.is_proving

    def plan(self, *args, **kwargs) -> Plan:
        """What was chosen for each layer, and what it costs: `print(handle.plan())` shows a table.

        Args:
            args, kwargs: a batch as the model takes it. A forward and backward of it find the shapes; others, some that
                write the direction and some of ordinary autograd, are timed. Gradients, `stats`, buffers and random
                numbers stay as they are. Without arguments the plan is that of the last backward.

        Raises:
            RuntimeError: without arguments before the first backward, or while nothing is recorded.
            ValueError: if `memory_budget` is too small for the batch, naming the smallest that works.
        """
        if not args and not kwargs:
            if not self._choices:
                raise RuntimeError("there was no backward yet: call plan(x) with a batch of inputs of the model")
            return plan_of(self._in_order(self._choices))
        if not self.recording():
            raise RuntimeError(
                "the capture records nothing here: leave no_grad, `with handle.paused():` or the torch.func transform;"
                " a removed handle plans nothing"
            )
        self._is_dry = True
        try:
            with self.verifier.paused():
                dry_run(self.model, args, kwargs, times=1)
        finally:
            self._is_dry = False
        choices = self._in_order(self._choices)
        with self._rehearsed(), self.verifier.paused():
            rgd_seconds = dry_run(self.model, args, kwargs, times=3)
        with self.paused():
            return plan_of(choices, rgd_seconds, dry_run(self.model, args, kwargs, times=3))

    def _in_order(self, choices: list[Choice]) -> list[Choice]:
        """As the model lists its parameters."""
        places = {name: place for place, name in enumerate(self._names.values())}
        return sorted(choices, key=lambda choice: places.get(choice.name, len(places)))

    @contextmanager
    def _rehearsed(self) -> Iterator[None]:
        """Backwards write directions, but nothing is remembered of them, and a policy of the user's is not asked."""
        saved = self.stats, self._policy, self._largest, self._take
        self._policy = Spectral() if needs_gram(self._policy, self._inverse, self._largest) else Fixed(0)
        self._largest = self._take = None
        try:
            yield
        finally:
            self.stats, self._policy, self._largest, self._take = saved

    def recording(self) -> bool:
        """Whether forwards are recorded now: not when paused, without gradients, or inside torch.func transforms."""
        if self._pauses or self._removed or not torch.is_grad_enabled():
            return False
        return _functorch.peek_interpreter_stack() is None

    def call(self, tap: Tap, args: tuple, kwargs: dict) -> object:
        """A call of the model, or of a part of it."""
        if torch.jit.is_tracing():
            with self.paused():
                return tap.original(*args, **kwargs)
        check_not_in_ddp(self.model)
        return self.verifier.run(Call.of(tap, args, kwargs))

    def run(self, call: Call) -> object:
        """`call`, without verification."""
        tap, args, kwargs, arrays = call
        is_part = tap.module is not self.model
        is_telling = arrays and (call.batch_size == 1 or is_part)
        if is_telling and not self.verifier.is_proving and _current_graph_task_id() == -1:
            first = arrays[0][None] if self.batch_dim is None else arrays[0].movedim(self.batch_dim, 0)
            self._calls.note(tap.module, tap.name, first, is_part)
        self.batch = Batch.among(arrays, self.model, self.batch_dim, is_list(args, kwargs))
        self.calls_begun += 1
        try:
            output = tap.recorded(args, kwargs)
        finally:
            self.batch_size, self.batch = self.batch.size, None
        for module in modules_in(self.model):
            if type(module) is DistributedDataParallel:
                check_not_wrapped(self.model)
            for key, parameter in module._parameters.items():
                if id(parameter) not in self.guards and parameter is not None and parameter.requires_grad:
                    self._admit_newcomer(module, key, parameter)
        for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
            if isinstance(tensor, Shared):
                self._refuse_shared(tensor)
        return output

    def _admit_newcomer(self, module: nn.Module, key: str, newcomer: Tensor) -> None:
        """Of what was frozen, or took a captured parameter's place; ValueError for a place that nothing watches."""
        if not isinstance(newcomer, nn.Parameter) or newcomer.numel() == 0:  # the others are of functional_call
            return
        if (module, key) not in self._slots:
            raise ValueError(
                f"parameter '{self.name_of(newcomer)}' came into the model after its capture, so backward would write"
                " its plain gradient: call .remove() on the handle and capture the model again"
            )
        self.guard(newcomer)

    def _refuse_shared(self, output: Shared) -> None:
        raise ValueError(
            f"an output of the model, of shape {tuple(output.shape)}, comes from '{output.owner}' alone, which"
            " took its input as shared by all samples; if it was the batch merged with another dimension, keep"
            f" the two apart, (B, T), or {AS_UNIT}"
        )

    def guard(self, parameter: nn.Parameter) -> None:
        """Notice gradients that reach `parameter` past the taps."""
        if id(parameter) not in self.guards:
            self._check_hooks(parameter, 0)
            if parameter not in self._names:  # as after load_state_dict(assign=True)
                check_not_sharded(self.model)
                self._names = {p: name for name, p in self.model.named_parameters()}
                for replaced in self.guards.keys() - set(map(id, self._names)):
                    self.guards.pop(replaced)[1].remove()
            # Weak: the garbage collector does not see into a guard that was compiled.
            refuse = partial(_refuse, weakref.ref(self), id(parameter))
            self.guards[id(parameter)] = parameter, _guard(parameter, refuse)

    def name_of(self, parameter: Tensor) -> str:
        """Its name in the model."""
        name = self._names.get(parameter)
        return name or next((name for name, p in self.model.named_parameters() if p is parameter), "?")

    def tap_of(self, module: nn.Module) -> Tap | None:
        """The tap in front of a module's forward."""
        return next((tap for tap in self._taps if tap.module is module), None)

    def captures(self, parameter: Tensor) -> bool:
        """Whether the gradient of `parameter` is written by this handle."""
        return parameter in self._names or any(owner._parameters.get(key) is parameter for owner, key in self._slots)

    def _check_hooks(self, parameter: nn.Parameter, own: int) -> None:
        if len(parameter._backward_hooks or ()) > own or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameter '{self.name_of(parameter)}' has gradient hooks, which would run before its"
                " direction is written: remove them and change .grad after backward() instead"
            )

    def refuse_outside(self, parameter: nn.Parameter) -> None:
        """Raise for a gradient that reaches `parameter` past the taps, unless paused."""
        if self._pauses:
            return
        name = self.name_of(parameter)
        raise RuntimeError(
            f"parameter '{name}' of shape {tuple(parameter.shape)} got gradient outside the forward of its module,"
            " which cannot be told apart by sample. If another module uses it (F.linear(x, other.weight)), give that"
            " module the parameter as its own, or capture the enclosing module as one unit with"
            " rgd_ext.register_rule(enclosing, rgd_ext.unit); if another method of its module uses it, call that from"
            " forward, and the module in its place; for a penalty on weights use weight_decay, or a"
            " backward of its own under `with handle.paused():`"
        )

    def admitted(self, record: Record, wanted: Wanted) -> Collection[str]:
        """The names of the parameters whose contributions the backward under way collects from `record`.

        With the first record a backward begins.
        """
        if wanted is None:
            raise RuntimeError(RETURNED_GRADIENT if record.inside == -1 else _reentrant(record))
        names = record.parameters if all(wanted) else list(compress(record.parameters, wanted))
        if not names:
            return names
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        task = _current_graph_task_id()
        if task != self._task or record.inside != -1:
            self._check_start(record, task)
            self._begin(task, record.batch_size)
        if self._take is not None:
            self._passed.add((record.call, record.batch_size))
        if record.batch_size != self._size:
            raise ValueError(
                f"batch sizes disagree in one backward: '{record.name}' ran with {record.batch_size} samples, modules"
                f" before it with {self._size}. Use one backward per batch, under `with handle.accumulate():` for one"
                " direction from all; and bags (B, T), filled up with padding_idx, where an nn.EmbeddingBag got offsets"
                " and another layer the same indices"
            )
        return names

    def _check_start(self, record: Record, task: int) -> None:
        if task in self._unfinished:
            raise RuntimeError(NESTED)
        check_not_empty(record.batch_size, record.name)
        if self._pauses or self._removed:
            raise RuntimeError(
                f"the forward of '{record.name}' was recorded, but its backward runs"
                f" {'after handle.remove()' if self._removed else 'under handle.paused()'}: put both on one side"
            )
        if record.inside != -1:
            raise RuntimeError(_reentrant(record))

    def keep(self, record: Record, names: Collection[str], inputs: Sequence[Tensor], grad: Tensor) -> None:
        """Keep what a layer contributes to the parameters it was admitted with, or what its rule makes that of."""
        if not self.small.take(record, names, inputs, grad):
            with full_precision(grad.device):
                self.contribute(record, names, record.contributions(inputs, grad))

    def contribute(self, record: Record, names: Collection[str], found: Contributions) -> None:
        """Keep the contributions to the parameters that a record was admitted with."""
        for name in names:
            factor, parameter = found.get(name), record.parameters[name]
            if isinstance(factor, Tensor):
                self.aside.formed.append((record, name, parameter, factor))
            elif factor is not None:
                self._factors.setdefault(parameter, []).append(self._settled(parameter, factor))
            else:
                raise _missing(record, found)

    def _is_known(self, aside: Aside) -> bool:
        """Whether what was put aside is planned and all that its parameters get."""
        if self._take is not None or self._is_dry:
            return False
        if self._factors and not self._factors.keys().isdisjoint(aside.parameters()):
            return False
        return self._planner.recall((aside.signature(), self._size, self._with_gram))

    def _plan(self, aside: Aside) -> None:
        """Make factors of what was put aside."""
        for parameter, factor in aside.factors():
            self._factors.setdefault(parameter, []).append(self._settled(parameter, factor))
        if aside.is_uniform():
            names = [self.name_of(parameter) for parameter in aside.parameters()]
            self._planner.remember((aside.signature(), self._size, self._with_gram), names)

    def _settled(self, parameter: nn.Parameter, factor: Factor) -> Factor:
        name = self.name_of(parameter)
        if self._is_dry:
            self._planner.note(name, factor, self._with_gram)
            return factor
        empty = self._workspace.empty if self._take is None else fresh
        return self._planner.settle(name, factor, self._with_gram, empty)

    def refuse_second_derivative(self, wanted: Wanted) -> None:
        """Raise if a derivative of gradients that passed a layer is wanted for its parameters."""
        if wanted is None or any(wanted):
            raise RuntimeError(SECOND_DERIVATIVE)

    def _begin(self, task: int, batch_size: int) -> None:
        # Whatever is there is of a backward that ended in an exception, as a rule.
        if self._task != -1:
            self._unfinished.add(self._task)
        self._task, self._size, self._factors, self.aside = task, batch_size, {}, Aside()
        self._passed = set()
        self.small.begin(-1 if self.is_collecting() else task, batch_size)
        # What is only collected may be asked for anything.
        self._with_gram = self._take is not None or needs_gram(self._policy, self._inverse, self._largest)
        self._planner.begin()
        self._workspace.restart()
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._finish, task))

    def _finish(self, task: int) -> None:
        if task != self._task:
            raise RuntimeError(NESTED)
        if not self.verifier.is_proving:
            self._calls.end(self._size)
        self.small.contribute(self)
        aside, self.aside, given = self.aside, Aside(), None
        if aside and self._is_known(aside):
            given = aside
        elif aside:
            self._plan(aside)
        factors, self._factors, self._task = self._factors, {}, -1
        if not factors and given is None:  # a module's output was used, but none of its parameters had a part in it
            return
        if self._is_dry:  # what forms gradients forms them for each use
            factors = {p: parts for p, parts in factors.items() if all(isinstance(f, (Outer, Rows)) for f in parts)}
        summed = {p: parts[0] if len(parts) == 1 else self._settled(p, add(parts)) for p, parts in factors.items()}
        self._choices = self._planner.finish()
        if self._is_dry:
            return
        if self._take is not None:
            self._take(summed, self._passed)
            return
        if self.batch_dim is None:
            self._calls.warn_of_only_sample()
        parameters = [*summed, *given.parameters()] if given else list(summed)
        gradients = CapturedGradients(list(summed.values()), given, releases=True)
        del aside, factors, summed  # or they would hold what `gradients` lets go of
        self._check_unhooked(parameters)
        self._write(parameters, gradients)

    def _check_unhooked(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            # Before the call, for which small models would wait.
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                self._check_hooks(parameter, _HOOKS)

    @torch.no_grad()
    def _write(self, parameters: list[nn.Parameter], gradients: CapturedGradients) -> None:
        with full_precision(parameters[0].device):
            direction, self.stats = solve(gradients, self._policy, self._inverse, self._largest)
        for parameter, step in zip(parameters, direction, strict=True):
            if parameter.grad is None:
                # A view made here could not be changed in place where autograd records.
                parameter.grad = step.detach() if step._is_view() else step
            elif parameter.grad.is_sparse and not step.is_sparse:
                parameter.grad = step + parameter.grad
            else:
                parameter.grad += step
        self._workspace.release()


def _refuse(handle: weakref.ref[Preconditioner], parameter: int, grad: Tensor | None) -> None:
    capture = handle()
    if grad is not None and capture is not None:
        capture.refuse_outside(capture.guards[parameter][0])


def _reentrant(record: Record) -> str:
    return (
        f"the forward of '{record.name}' ran inside a backward, as in re-entrant checkpointing, which hides when a"
        " backward ends. In the place of use_reentrant=True, or of a checkpoint function of your own, call"
        " torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)"
    )


def _refuse_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> NoReturn:
    raise RuntimeError(
        "the model of this RGD has been captured anew since, and .grad has the directions of the new capture: use the"
        " newer optimizer; for several optimizers of one model call rgd_ext.precondition(model) once, and pass them"
        " parameters, RGD(model.parameters(), ...)"
    )


def _missing(record: Record, found: dict[str, Tensor | Factor | None]) -> Exception:
    none = [name for name in record.parameters if found.get(name, "") is None]
    if none:
        return TypeError(f"the rule for '{record.name}' returned None for '{none[0]}': return a (B, *shape) tensor")
    return RuntimeError(
        f"the rule for '{record.name}' returned contributions for {sorted(found)}, but its trainable parameters are"
        f" {sorted(record.parameters)}: return one (B, *shape) tensor for each"
    )


def live_handle(model: nn.Module) -> Preconditioner | None:
    """The handle that captures `model` itself, or None."""
    return next((handle for handle in _live if handle.model is model), None)


def handle_of(module: nn.Module) -> Preconditioner | None:
    """The handle of the capture that `module` is in: its own, or that of a model around it; None without one.

    Raises:
        TypeError: if `module` is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = rgd_ext.RGD(model, lr=0.1)
        >>> rgd_ext.handle_of(model[0]) is optimizer.preconditioner
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: pass a torch.nn.Module")
    return live_handle(module) or next((handle for handle in _live if handle.tap_of(module) is not None), None)


def _check_free(model: nn.Module, earlier: Preconditioner | None) -> None:
    captured = {tap.module for handle in _live if handle is not earlier for tap in handle._taps}
    for name, module in model.named_modules():
        if module in captured:
            place = f"module '{name}' of the model" if name else f"the model ({type(model).__name__})"
            raise ValueError(
                f"{place} is captured already, by the handle that rgd_ext.handle_of(module) returns: use that handle,"
                " and RGD(model.parameters(), ...) for an optimizer; or call its .remove() first"
            )


def is_captured(parameter: Tensor) -> bool:
    """Whether a live capture writes the gradient of `parameter`."""
    return any(handle.captures(parameter) for handle in _live)


def precondition(
    model: nn.Module,
    *,
    epsilon: Policy | float = Spectral(0.5),
    inverse: Inverse = "weak-field",
    batch_norm: Literal["error", "contribution"] = "error",
    memory_budget: float | None = None,
    verify: bool = True,
    batch_dim: int | None = 0,
) -> Preconditioner:
    """Make every `backward()` through `model` write the RGD direction into `.grad`, for any torch optimizer to use.

    At the end of each backward, `.grad` has (I - eps D) g added to it, eq. (10), where autograd would have added g; g_i
    is sample i's part of the gradient of the loss times the batch size, whatever the reduction of the loss. Samples lie
    along dimension `batch_dim` of the model's first tensor argument. The model keeps its type, names and state_dict;
    copies and pickles of it are ordinary models.

    Args:
        model: at least one trainable parameter; not captured already, nor any of its modules. Only a capture that
            `RGD(model)` made is taken over, and that optimizer refuses to step from then on.
        epsilon: a policy, a number (`Fixed`), or a callable from `Stats` to epsilon. Under a `torch.amp.GradScaler` the
            `Stats` are those of the scaled loss: pass `Fixed(value, loss_scale=scaler.get_scale)` for a constant, and
            divide in a callable of yours by the square of the scale.
        inverse: "weak-field" for I - eps D, "exact" for (I + eps D)^-1.
        batch_norm: batch normalisation in training mode couples the samples. "error" refuses it; "contribution" takes
            the batch's statistics as part of the layer: g_i is then sample i's contribution to the exact gradient.
        memory_budget: bytes that per-sample gradients, or layers' inputs and output gradients in their place, may take
            at the end of a backward; the first backward with new shapes takes the least. None lets the gradients of
            a layer take three times what its inputs and output gradients take, and `math.inf` as much as the fastest
            way takes; with these two up to 16 MiB are kept from step to step, on the CPU.
        verify: prove on the model's own batches, before the first direction of each kind of call, that every sample
            gets its own gradient; see `rgd_ext.verify`. The forward raises ValueError if not. False for a model whose
            forward has effects outside of the model, since it is called several times.
        batch_dim: the dimension of the samples in the first tensor of the model's arguments: 1 for models that take
            time first, (T, B, ...). Other tensors, and those inside of the model, have them there or along dimension 0.
            None takes every call for one sample, whatever its arguments are: slow, exact, and the last remedy where
            nothing tells samples apart. Call the model and backward() for each inside `with handle.accumulate():`.

    Returns:
        The handle: `.stats`, `.plan()`, `.paused()`, `.accumulate()`, `.defer()`, `.remove()`; a context manager.

    Raises:
        TypeError: if `model` is not a module, `epsilon` not a policy, `verify` not a bool, or `batch_dim` no int.
        ValueError: for arguments out of range, a model without trainable parameters or with uninitialised ones, a
            second capture, or batch normalisation in training mode.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with rgd_ext.precondition(model, epsilon=rgd_ext.Rayleigh(0.3)) as handle:
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> handle.stats.batch_size
        8
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
    if batch_norm not in ("error", "contribution"):
        raise ValueError(f"batch_norm is {batch_norm!r}: choose 'error' or 'contribution'")
    policy = checked_policy(epsilon, inverse)
    budget = _checked_budget(memory_budget)
    earlier = next((handle for handle in _live if handle.model is model and handle.owner is not None), None)
    _check_free(model, earlier)
    check_model(model, batch_norm)
    if not isinstance(verify, bool):
        raise TypeError(f"verify is {verify!r}: pass True or False")
    batch_dim = _checked_dim(batch_dim)
    if earlier is not None:
        earlier.give_way()
    return Preconditioner(model, policy, inverse, batch_norm, budget, verify, batch_dim)


def _checked_dim(batch_dim: int | None) -> int | None:
    if batch_dim is None:
        return None
    if not isinstance(batch_dim, int) or isinstance(batch_dim, bool):
        raise TypeError(f"batch_dim is {batch_dim!r}: pass the dimension of the samples, an int, or None")
    if batch_dim < 0:
        raise ValueError(f"batch_dim is {batch_dim}: count dimensions from the front, from 0")
    return batch_dim


def _checked_budget(memory_budget: float | None) -> float | None:
    if memory_budget is None:
        return None
    if not isinstance(memory_budget, (int, float)) or isinstance(memory_budget, bool):
        raise TypeError(f"memory_budget is {memory_budget!r}: pass a number of bytes, or None")
    if not memory_budget > 0:
        raise ValueError(f"memory_budget is {memory_budget}: pass a positive number of bytes, math.inf, or None")
    return memory_budget
