"""Per-sample gradients of a data set, a batch at a time: passes that are checked, resumable and watched."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from .batch_gradients import batch_gradients, check_module
from .checkpoint import Checkpoint, fingerprint
from .gradients import PerSampleGradients
from .per_sample_loss import PerSampleLoss
from .progress import progress_bar

# What a pass adds up, and how a batch adds to it, in place.
State = dict[str, Tensor]
Step = Callable[[State, PerSampleGradients], None]

# Between two writes of an unfinished pass, in seconds.
_SAVE_EVERY = 60.0
# Relative difference between two evaluations of one loss, on whatever device.
_SAME_LOSS = 1e-4


class Held:
    """Per-sample gradients that are all there: a pass is one step.

    Attributes:
        like: one tensor of the right shape, dtype and device per parameter.
    """

    @torch.no_grad()
    def __init__(self, grads: PerSampleGradients) -> None:
        self.grads = grads
        self.like = grads.mean()

    @torch.no_grad()
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after a step."""
        step(state, self.grads)
        return state

    @torch.no_grad()
    def seconds(self, state: State, step: Step) -> float:
        """Time of a pass, measured."""
        return _timed(lambda: step(state, self.grads))


class Stream:
    """Per-sample gradients of a data set, computed again in every pass.

    Args:
        model: in evaluation mode, so that all passes see the same function.
        loss_fn: (output, y) -> loss.
        loader: an iterable of pairs (x, y), the same ones in every pass.
        checkpoint: a folder for finished and unfinished passes, or None.
        progress: whether to show a bar for each pass.

    Attributes:
        like: one tensor of the right shape, dtype and device per trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[object, object], Tensor],
        loader: Iterable[tuple[object, object]],
        checkpoint: str | os.PathLike | None,
        progress: bool,
    ) -> None:
        check_module(model)
        training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
        if training:
            raise ValueError(
                f"module '{training[0]}' is in training mode, in which dropout and batch normalisation would make the"
                " passes disagree: call model.eval() first"
            )
        if isinstance(loader, Iterator):
            raise TypeError(
                f"loader is a {type(loader).__name__}, which can be passed over only once: pass a DataLoader or a list"
                " of batches"
            )
        self.model, self.loader = model, loader
        self.like = [p.detach() for p in model.parameters() if p.requires_grad]
        self._loss = PerSampleLoss(loss_fn)
        self._progress = progress
        self._weights = self._fingerprint()
        self._log: _Log | None = None
        self._passes = 0
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, self._weights)

    def _fingerprint(self) -> str:
        trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return fingerprint([type(self.model).__qualname__, trainable, self.model.state_dict()])

    def length(self) -> int | None:
        """The number of batches, or None if the loader does not know."""
        if self._log is not None:
            return len(self._log.losses)
        return len(self.loader) if hasattr(self.loader, "__len__") else None

    @torch.no_grad()
    def seconds(self, state: State, step: Step) -> float:
        """Time of a pass, from that of its first batch; TypeError if the number of batches is not known."""
        length = self.length()
        if length is None:
            raise TypeError(f"loader, a {type(self.loader).__name__}, has no len(): compute trace() first, in one pass")
        with batch_gradients(self.model, self._loss) as evaluate:
            x, y = self._first_batch()
            return length * _timed(lambda: step(state, evaluate(x, y)[1]))

    def _first_batch(self) -> tuple[object, object]:
        for batch in self.loader:
            return _pair(batch, 0)
        raise ValueError("loader is empty: pass at least one batch (x, y)")

    @torch.no_grad()
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after a step for each batch; from the checkpoint, as far as it goes.

        Raises:
            ValueError: if the checkpoint is damaged or belongs to other data, or for a bad batch or loss.
            RuntimeError: if batches, weights or losses differ from those of the first pass.
        """
        saved = self._checkpoint.load(name) if self._checkpoint is not None else None
        log = self._log or _Log()
        done = 0
        if saved is not None:
            done, state = saved["batches"], {key: value.to(state[key].device) for key, value in saved["state"].items()}
            if self._log is None:
                log = _Log(**saved["log"])
                self._check_owner(log, saved["complete"])
            elif saved["log"]["digests"] != log.digests:
                raise ValueError(self._is_foreign(f"its {name}.pt is of other data than its moments.pt"))
        if saved is None or not saved["complete"]:
            self._pass(name, state, step, done, log)
        self._log, self._loss.is_trusted = log, True
        return state

    def _check_owner(self, log: _Log, is_complete: bool) -> None:
        """Compare all data that the checkpoint has seen, without the model, and the loss of the first batch."""
        with batch_gradients(self.model, self._loss) as evaluate, self._bar("checkpoint's data") as advance:
            # No pass has this seed.
            torch.default_generator.manual_seed(0)
            try:
                for index, (x, y) in enumerate(islice(self._batches(log), None if is_complete else len(log.losses))):
                    if index == 0:
                        log.check_loss(0, evaluate(x, y)[0].item())
                    advance()
            except _DifferenceError as error:
                raise ValueError(self._is_foreign(str(error))) from error

    def _is_foreign(self, reason: str) -> str:
        return (
            f"checkpoint {self._checkpoint.folder} belongs to other data or another loss ({reason}): pass another path"
        )

    def _batches(self, log: _Log, may_add: bool = False) -> Iterator[tuple[object, object]]:
        """The pairs (x, y) of a pass, which are those of the log."""
        count = 0
        for batch in self.loader:
            x, y = _pair(batch, count)
            log.check_data(count, fingerprint((x, y)), may_add)
            yield x, y
            count += 1
        log.check_end(count)

    def _bar(self, title: str) -> AbstractContextManager[Callable[[], None]]:
        return progress_bar(title, self.length()) if self._progress else nullcontext(lambda: None)

    def _pass(self, name: str, state: State, step: Step, done: int, log: _Log) -> None:
        """Steps from batch `done` on."""
        if self._fingerprint() != self._weights:
            raise RuntimeError("the model's weights have changed since DiffusionMatrix.from_dataset: call it again")
        self._passes += 1
        is_first = self._log is None
        saved_at = time.monotonic()

        def save(batches: int, is_complete: bool) -> None:
            content = {"batches": batches, "complete": is_complete, "state": state, "log": vars(log)}
            self._checkpoint.save(name, content)

        title = f"pass {self._passes} ({name.partition('-')[0]})"
        with batch_gradients(self.model, self._loss) as evaluate, self._bar(title) as advance:
            # Each pass has its own seed, so that a loader that shuffles or augments is noticed.
            torch.default_generator.manual_seed(self._passes)
            for count, (x, y) in enumerate(self._batches(log, is_first), 1):
                if count > done:
                    loss, grads = evaluate(x, y)
                    log.check_loss(count - 1, loss.item(), is_first)
                    step(state, grads)
                    del grads  # before the next batch makes its own
                advance()
                if self._checkpoint is not None and count > done and time.monotonic() - saved_at >= _SAVE_EVERY:
                    save(count, is_complete=False)
                    saved_at = time.monotonic()
        if self._checkpoint is not None:
            save(len(log.losses), is_complete=True)


class _DifferenceError(RuntimeError):
    """A pass does not see what the first one saw."""


class _Log:
    """What the batches of the first pass were: a hash of the data of each, and its loss."""

    def __init__(self, digests: Iterable[str] = (), losses: Iterable[float] = ()) -> None:
        self.digests, self.losses = list(digests), list(losses)

    def check_data(self, index: int, digest: str, may_add: bool = False) -> None:
        """Raise _DifferenceError if batch `index` is another one."""
        if may_add and index == len(self.digests):
            self.digests.append(digest)
        if index >= len(self.digests) or self.digests[index] != digest:
            raise _DifferenceError(
                f"batch {index} differs from that of the first pass: the data has changed, or the loader shuffles or"
                " augments; use shuffle=False, the same batch size, and no random transforms"
            )

    def check_loss(self, index: int, loss: float, may_add: bool = False) -> None:
        """Raise _DifferenceError if the same batch `index` has another loss."""
        if may_add and index == len(self.losses):
            self.losses.append(loss)
        before = self.losses[index]
        if not math.isclose(loss, before, rel_tol=_SAME_LOSS, abs_tol=1e-12):
            raise _DifferenceError(
                f"the loss of batch {index} is {loss:.6g}, in the first pass it was {before:.6g}: the model or the loss"
                " is random; switch that off"
            )

    def check_end(self, count: int) -> None:
        """Raise if there were no batches, or fewer than in the first pass."""
        if count == 0:
            raise ValueError("loader is empty: pass at least one batch (x, y)")
        if count < len(self.losses):
            raise _DifferenceError(
                f"the loader gave {count} batches, but {len(self.losses)} in the first pass: use the same data in every"
                " pass"
            )


def _pair(batch: object, index: int) -> tuple[object, object]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batch {index} of the loader is a {type(batch).__name__}: pass pairs (x, y)")
    return batch[0], batch[1]


def _timed(run: Callable[[], None]) -> float:
    run()  # the first time allocates
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
