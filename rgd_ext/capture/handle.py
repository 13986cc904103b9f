"""The handle of a captured model."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..contributions.buffers import Workspace
from ..contributions.ledger import Contributions
from ..distributed import Exchange, ModelParameters
from ..metric import ParameterVector, Rule, Solver, State, Stats
from ..planning.planner import Choice, Planner
from ..planning.table import Plan, plan_of
from ..planning.trial import dry_run
from .context import CaptureContext, Options
from .install import recorders_for
from .model_call import ModelCall
from .no_samples import run_without_samples
from .nodes import receive
from .recorders.recorder import Recorder
from .sample_record import SampleRecord
from .sinks import HandOver, NoteShapes, Refusal, WriteDirection
from .unions import DEFERRED, INSIDE_BLOCK, LOST, NESTED_BLOCKS, NOT_DEFERRED, BatchUnion
from .verification.verifier import Verifier
from .wrappers import Wrapper, check_not_in_ddp

_SHARDED = (
    "plan(x) of a sharded model, whose other processes would have to join in each of its forwards and backwards: run a"
    " training step in all of them, and call plan() without arguments; or plan the model before fully_shard"
)
_NO_SAMPLES = (
    "an empty batch of a sharded model, whose processes wait for each other in every forward and backward: pass at"
    " least one sample in each process, as with drop_last=True"
)
# The optimizers that refuse to step, since the model has been captured anew, and their hooks.
_refusals: weakref.WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


class Preconditioner:
    """The handle of a captured model, from `precondition` or `observe`; a context manager that removes the capture.

    Attributes:
        model: the captured model.
        context: the capture as recorders and autograd nodes see it.
        verifier: verifies calls of the model.
    """

    def __init__(
        self,
        parameters: ModelParameters,
        rule: Rule,
        options: Options,
        verify: bool = True,
        per_parameter: bool = False,
        exchange: Exchange | None = None,
        wrapper: Wrapper | None = None,
    ) -> None:
        self.model = model = parameters.model
        self.context = CaptureContext(parameters, options, receive)
        self.verifier = Verifier(self.context, verify)
        self._planner = Planner(options.memory_budget)
        workspace, solver, watched = Workspace(options.kept), Solver(rule), self.context.parameters
        self._direction = WriteDirection(solver, self._planner, watched, workspace, per_parameter, exchange)
        self._union: BatchUnion | None = None
        self._record: SampleRecord | None = None
        self._wrapper = wrapper
        if wrapper is not None:
            wrapper.silence(lambda: self._union is not None)
        # The `RGD` that made the capture, which ends with a new capture of the model.
        self._owner: weakref.ref[torch.optim.Optimizer] | None = None
        self.context.start(self._direction, self._enter)
        self._recorders = recorders_for(self.context, model)
        for recorder in self._recorders:
            recorder.install()
        self.context.parameters.watch_all((owner, key) for each in self._recorders for owner, key, _ in each.places)

    def __repr__(self) -> str:
        state = "removed" if self.context.is_removed else f"{len(self._recorders)} modules"
        return f"Preconditioner({type(self.model).__name__}, {state}, {self._direction.solver.rule})"

    def __enter__(self) -> Preconditioner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of a model is not captured: where the model keeps its handle, the copy has None.
        return type(None), ()

    @property
    def stats(self) -> Stats | None:
        """`Stats` of the last direction, or None before the first."""
        return self._direction.stats

    @property
    def batch_dim(self) -> int | None:
        """The dimension of the samples in the model's inputs, or None where each call is for one sample."""
        return self.context.options.batch_dim

    @property
    def has_group(self) -> bool:
        """Whether the capture was made with a process group, in which gradients are exchanged."""
        return self._direction.exchange is not None

    @property
    def own_samples(self) -> slice:
        """The places of this process's samples in the arrays of `stats`.

        With a process group these have the samples of all processes. Otherwise, and with `mode="local"`, it is the
        slice of all samples; `slice(0, 0)` before the first direction.
        """
        stats, exchange = self.stats, self._direction.exchange
        whole = slice(0, 0 if stats is None else stats.batch_size)
        return whole if exchange is None or stats is None else exchange.places_in(stats.batch_size)

    def align(self, vectors: ParameterVector | None) -> None:
        """From now on `stats.aligned` has <g_i, v> of each sample i, (B,), not centred; pass None to end it.

        For v the gradient of a validation batch it is the first-order change of that batch's loss per step along g_i.
        The vector is copied. No per-sample gradient is formed for it beyond those that the strategies form. Like the
        g_i, the products carry the scale of the loss: divide by that of a GradScaler, and with a sum over samples by B.

        Args:
            vectors: v: a dict from names of trainable parameters, where missing ones count as zeros, or a sequence
                with a tensor for each trainable parameter, in the order of `model.parameters()`.

        Raises:
            ValueError: for wrong names, numbers, shapes or devices.
            TypeError: for wrong dtypes.
            RuntimeError: if the capture has been removed.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> validation = torch.autograd.grad(model(torch.randn(5, 3)).square().mean(), list(model.parameters()))
            >>> with rgd_ext.observe(model) as handle:
            ...     handle.align(validation)
            ...     model(torch.randn(8, 3)).square().mean().backward()
            >>> handle.stats.aligned.shape
            torch.Size([8])
        """
        if self.context.is_removed:
            raise RuntimeError("the capture was removed, so there are no statistics: capture the model again")
        self._direction.align(vectors)

    def record_to(self, path: str | os.PathLike[str], size: int) -> None:
        """From now on `record` writes to a .npy file with a row for each sample of a data set.

        `numpy.load(path)` reads it: a structured array of shape (size,), which `pandas.DataFrame` takes. Its fields
        have the names and the meaning that they have in `stats`: `batch_size`, `grad_norm` and `trace` of the batch,
        `sample_norms`, `alignments`, `squared_norms`, `aligned` (NaN without `align`) and `weights` of the sample. A
        row that was never recorded has batch_size 0 and NaN elsewhere.

        Args:
            path: the file, such as "epoch1.npy"; its folder exists. An existing file is continued: rows that are not
                recorded again stay.
            size: the number of samples in the data set.

        Raises:
            TypeError, ValueError: for a size that is not a positive integer; ValueError if the file holds something
                else, which is left as it is.
            OSError: if the file cannot be written.
        """
        self._record = SampleRecord(path, size)

    def record(self, index: Tensor | np.ndarray | Sequence[int]) -> None:
        """Replace the rows `index` by the statistics of the samples of the last direction; waits for the device.

        Each row is written whole: a process that is killed leaves no torn rows.

        Args:
            index: the indices of the samples in the data set, integers, shape (B,); after `accumulate` or `write` those
                of all batches, one batch after another, in the order of their first backwards. Where an index is
                repeated, its last sample stays. With a process group those of the samples of this process; all of them
                may record to one file.

        Raises:
            RuntimeError: before `record_to` or a backward, or if the last direction is recorded already.
            TypeError, ValueError: for indices that are not one for each sample, or outside of the data set; ValueError
                if something else is in the place of the file.
            OSError: if the file is not there or cannot be written. All rows are whole then.

        Example:
            >>> import numpy, tempfile
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(20, 3)
            >>> with tempfile.TemporaryDirectory() as folder, rgd_ext.observe(model) as handle:
            ...     handle.record_to(f"{folder}/epoch.npy", size=20)
            ...     for index in torch.randperm(20).split(5):
            ...         model(x[index]).square().mean().backward()
            ...         handle.record(index)
            ...     rows = numpy.load(f"{folder}/epoch.npy")
            >>> rows["sample_norms"].shape, set(rows["batch_size"].tolist())
            ((20,), {5})
        """
        if self._record is None:
            raise RuntimeError("there is no file to record to: call handle.record_to(path, size) first")
        if self.stats is None:
            raise RuntimeError(
                "there was no backward of the captured model yet: call record(index) after loss.backward(), or after"
                " handle.write() if the handle defers"
            )
        self._record.write(index, self.stats, self.own_samples)

    def remove(self) -> None:
        """Leave the model as it was found. Gradients already written stay; what `defer` has collected is dropped."""
        for recorder in self._recorders:
            recorder.uninstall()  # where somebody has wrapped it since, a removed capture lets everything through
        self._recorders = []
        self.context.remove()
        if self._wrapper is not None:
            self._wrapper.restore()
        self._union = None
        self.context.switch(self._direction)
        self._direction.clear()

    def belongs_to(self, owner: torch.optim.Optimizer) -> None:
        """Note the optimizer that made the capture: it refuses to step while a later capture is another's."""
        self._owner = weakref.ref(owner)
        refusal = _refusals.pop(owner, None)
        if refusal is not None:
            refusal.remove()

    @property
    def has_owner(self) -> bool:
        """Whether an optimizer made the capture, so that a new one may take its place."""
        return self._owner is not None

    def give_way(self) -> None:
        """Leave the model to a new capture, whose directions the parameters of the owner get."""
        owner = None if self._owner is None else self._owner()
        self.remove()
        if owner is not None:
            _refusals[owner] = owner.register_step_pre_hook(_refuse_step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ordinary autograd for a while: forwards and backwards inside give plain gradients.

        For gradient penalties, `torch.autograd.grad` and second derivatives. Forward and backward both belong inside.
        """
        with self.context.paused():
            yield

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
        self._union = union = BatchUnion(is_deferred=False, stepped_of=self.context.parameters.stepped_of)
        try:
            with self.context.directed_to(self._collection(union)):
                yield
        finally:
            self._union = None
        self._write(union)

    def _collection(self, union: BatchUnion) -> HandOver:
        return HandOver(union.add, self._planner, self.context.parameters, keeps_contributions=True)

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
            self._union = BatchUnion(is_deferred=True, stepped_of=self.context.parameters.stepped_of) if on else None
            self.context.switch(self._direction if self._union is None else self._collection(self._union))

    @property
    def is_deferring(self) -> bool:
        """Whether backwards only collect, since `defer`."""
        return self._union is not None and self._union.is_deferred

    def write(self) -> None:
        """Add the direction of the union of all batches since the last `write` to `.grad`, with `defer` on.

        Call it before the optimizer's step, and before gradients are clipped or unscaled. If nothing was collected, as
        where a trainer has skipped its batches, nothing happens.

        Raises:
            RuntimeError: if the handle does not defer.
            ValueError: for gradient hooks on parameters.
            Exception: of a policy or a rule of yours. What was collected is kept then, for another `write`.
        """
        if self._union is None or not self._union.is_deferred:
            raise RuntimeError(NOT_DEFERRED if self._union is None else INSIDE_BLOCK)
        self._write(self._union)

    def _write(self, union: BatchUnion) -> None:
        self.context.parameters.check_unhooked(union.parameters())
        if self._direction.per_parameter:
            union.check_complete(self.context.parameters.name_of)
        if union or self._direction.exchange is not None:
            self._direction.finish_union(union.batch_size, union.joined() if union else [])
            union.drop()

    def drop(self) -> None:
        """Forget the backwards that `defer` or `accumulate` has collected since the last direction."""
        if self._union is not None:
            self._union.drop()

    @contextmanager
    def collect(self, keep: bool = True) -> Iterator[list[Contributions]]:
        """Backwards inside add their contributions to the list this yields, and write nothing.

        Args:
            keep: whether the contributions outlive what the user may change, such as the batch.
        """
        with self.context.collecting(self._planner, keeps_contributions=keep) as parts:
            yield parts

    @contextmanager
    def refusing(self, message: str) -> Iterator[None]:
        """Backwards inside raise RuntimeError with this message."""
        with self.context.directed_to(Refusal(message, self._planner, self.context.parameters)):
            yield

    def state_dict(self) -> State:
        """What later directions depend on besides the parameters, for a training that is resumed.

        It is the memory of `Spectral(every=...)`, and empty otherwise. `RGD.state_dict` contains it.
        """
        return self._direction.solver.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state_dict` was called; an empty dict lets the policy begin anew, and others ignore it.

        Raises:
            ValueError: if `state` is not from the `state_dict` of a handle; nothing is changed then.
        """
        self._direction.solver.load_state_dict(state)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """What was chosen for each layer, and what it costs: `print(handle.plan())` shows a table.

        Args:
            args, kwargs: a batch as the model takes it. A forward and backward of it find the shapes; others, some that
                write the direction and some of ordinary autograd, are timed. Gradients, `stats`, buffers and random
                numbers stay as they are. Without arguments the plan is that of the last backward.

        Raises:
            RuntimeError: without arguments before the first backward, or while nothing is recorded; with arguments, for
                a sharded model.
            ValueError: if `memory_budget` is too small for the batch, naming the smallest that works.
        """
        if not args and not kwargs:
            choices = self._choices()
            if not choices:
                raise RuntimeError("there was no backward yet: call plan(x) with a batch of inputs of the model")
            return plan_of(choices)
        if not self.context.is_recording():
            raise RuntimeError(
                "the capture records nothing here: leave no_grad, `with handle.paused():` or the torch.func transform;"
                " a removed handle plans nothing"
            )
        solver, parameters = self._direction.solver, self.context.parameters
        if parameters.is_sharded:
            raise RuntimeError(_SHARDED)
        with self.context.directed_to(NoteShapes(solver.needs_gram, self._planner, parameters)), self.verifier.paused():
            dry_run(self.model, args, kwargs, times=1)
        choices = self._choices()
        rehearsal = self._direction.rehearsal()
        with self.context.directed_to(rehearsal), self.verifier.paused():
            rgd_seconds = dry_run(self.model, args, kwargs, times=3)
        with self.paused():
            return plan_of(choices, rgd_seconds, dry_run(self.model, args, kwargs, times=3))

    def _choices(self) -> list[Choice]:
        """Those of the last backward, as the model lists its parameters."""
        return self.context.parameters.in_model_order(self._planner.choices(), lambda choice: choice.name)

    def is_recording(self) -> bool:
        """Whether forwards are recorded now: not when paused, without gradients, or inside torch.func transforms."""
        return self.context.is_recording()

    def _enter(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """A call of the model, or of a part of it."""
        if torch.jit.is_tracing():
            with self.paused():
                return recorder.original(*args, **kwargs)
        check_not_in_ddp(self.model, self._wrapper)
        call, exchange = ModelCall.of(recorder, args, kwargs), self._direction.exchange
        if exchange is not None and call.batch_size == 0:
            if self.context.parameters.is_sharded:
                raise ValueError(_NO_SAMPLES)
            return run_without_samples(call)
        return self.verifier.run(call)

    def recorder_of(self, module: nn.Module) -> Recorder | None:
        """The recorder in front of a module's forward."""
        return next((recorder for recorder in self._recorders if recorder.module is module), None)

    def recorded_modules(self) -> set[nn.Module]:
        """The modules that have a recorder."""
        return {recorder.module for recorder in self._recorders}

    def captures(self, parameter: Tensor) -> bool:
        """Whether the gradient of `parameter` is written by this handle."""
        return self.context.parameters.captures(parameter)


def _refuse_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise RuntimeError(
        f"the model of this {type(optimizer).__name__} has been captured anew since, by a newer optimizer: use that."
        " For several optimizers along RGD directions call rgd_ext.precondition(model) once, and pass them parameters,"
        " RGD(model.parameters(), ...)"
    )
