"""The per-sample gradients of a data set, a batch at a time, in passes that are checked, resumable and watched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from ..gradients import PerSampleGradients
from ..progress import progress_bar
from .batch_gradients import batch_gradients, check_module
from .batch_log import BatchLog, DifferenceError
from .checkpoint import Checkpoint, fingerprint
from .per_sample_loss import Criterion, PerSampleLoss
from .sources import Source, State, Step, timed
from .vectors import ParameterSpace

# The time between two writes of an unfinished pass, in seconds.
_SAVE_EVERY = 60.0


class Stream(Source):
    """Per-sample gradients of a data set, computed again in every pass.

    Args:
        model: in evaluation mode, so that all passes see the same function.
        loss_fn: (output, y) -> loss.
        loader: an iterable of pairs (x, y), the same ones in every pass.
        checkpoint: a folder for finished and unfinished passes, or None.
        progress: whether to show a bar for each pass.

    Raises:
        TypeError: if `model` is not a module, or `loader` is an iterator.
        ValueError: if a module is in training mode, or the checkpoint belongs to another model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Criterion,
        loader: Iterable[object],
        checkpoint: str | os.PathLike[str] | None,
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
        self.space = ParameterSpace([p.detach() for p in model.parameters() if p.requires_grad])
        self._loss = PerSampleLoss(loss_fn)
        self._progress = progress
        self._weights = self._fingerprint()
        self._log: BatchLog | None = None
        self._passes = 0
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, self._weights)

    def _fingerprint(self) -> str:
        trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return fingerprint([type(self.model).__qualname__, trainable, self.model.state_dict()])

    def num_batches(self) -> int | None:
        """The number of batches in a pass, or None before the first one if the loader does not know its length."""
        if self._log is not None:
            return len(self._log.losses)
        try:
            return len(self.loader)  # type: ignore[arg-type]  # not every iterable has a length
        except TypeError:  # as of an iterable data set in a DataLoader, which has a __len__ all the same
            return None

    @torch.no_grad()
    def seconds(self, state: State, step: Step) -> float:
        """The time of a pass, from that of its first batch; TypeError if the number of batches is not known."""
        number = self.num_batches()
        if number is None:
            raise TypeError(f"loader, a {type(self.loader).__name__}, has no len(): compute trace() first, in one pass")
        with batch_gradients(self.model, self._loss) as evaluate:
            x, y = self._first_batch()
            return number * timed(lambda: step(state, evaluate(x, y)[1]))

    def _first_batch(self) -> tuple[object, object]:
        for batch in self.loader:
            return _pair(batch, 0)
        raise ValueError("loader is empty: pass at least one batch (x, y)")

    def centred_gramian(self, mean: Tensor, samples: int) -> Tensor:
        """The products <g_i - g, g_j - g>, (N, N), from G, which one pass collects."""

        def step(state: State, grads: PerSampleGradients) -> None:
            rows = state["rows"][int(state["count"]) :][: grads.batch_size]
            rows.copy_(self.space.gradient_rows(grads))
            state["count"] += grads.batch_size

        state = {"count": self.space.zeros(), "rows": self.space.zeros(samples, self.space.dimension)}
        centred = self.fold("gradients", state, step)["rows"] - mean
        return centred @ centred.T

    def gramian_elements(self, samples: int) -> int:
        """N d, the size of G."""
        return samples * self.space.dimension

    @torch.no_grad()
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after a step for each batch; what a checkpoint holds of this pass is not computed again.

        Raises:
            ValueError: if the checkpoint is damaged or belongs to other data, or for a bad batch or loss.
            RuntimeError: if batches, weights or losses differ from those of the first pass.
        """
        saved = self._checkpoint.load(name) if self._checkpoint is not None else None
        log = self._log or BatchLog()
        done = 0
        if saved is not None:
            done, state = saved["batches"], {key: value.to(state[key].device) for key, value in saved["state"].items()}
            if self._log is None:
                log = BatchLog(**saved["log"])
                self._check_owner(log, saved["complete"])
            elif saved["log"]["digests"] != log.digests:
                raise ValueError(self._is_foreign(f"its {name}.pt is of other data than its moments.pt"))
        if saved is None or not saved["complete"]:
            self._pass(name, state, step, done, log)
        self._log = log
        self._loss.trust()
        return state

    def _check_owner(self, log: BatchLog, is_complete: bool) -> None:
        """Compare all data that the checkpoint has seen, without the model, and the loss of the first batch."""
        with batch_gradients(self.model, self._loss) as evaluate, self._bar("checkpoint's data") as advance:
            # The passes are seeded with 1, 2, ..., see `_pass`.
            torch.default_generator.manual_seed(0)
            try:
                for index, (x, y) in enumerate(islice(self._batches(log), None if is_complete else len(log.losses))):
                    if index == 0:
                        log.check_loss(0, evaluate(x, y)[0].item())
                    advance()
            except DifferenceError as error:
                raise ValueError(self._is_foreign(str(error))) from error

    def _is_foreign(self, reason: str) -> str:
        return (
            f"checkpoint {self._checkpoint.folder}"  # type: ignore[union-attr]  # there is one
            f" belongs to other data or another loss ({reason}): pass another path"
        )

    def _batches(self, log: BatchLog, may_add: bool = False) -> Iterator[tuple[object, object]]:
        """The pairs (x, y) of a pass, each of which is compared to the log."""
        count = 0
        for batch in self.loader:
            x, y = _pair(batch, count)
            log.check_data(count, fingerprint((x, y)), may_add)
            yield x, y
            count += 1
        log.check_end(count)

    def _bar(self, title: str) -> AbstractContextManager[Callable[[], None]]:
        return progress_bar(title, self.num_batches()) if self._progress else nullcontext(lambda: None)

    def _pass(self, name: str, state: State, step: Step, done: int, log: BatchLog) -> None:
        """Call `step` for every batch from number `done` on, and save what it makes of `state`."""
        if self._fingerprint() != self._weights:
            raise RuntimeError("the model's weights have changed since DiffusionMatrix.from_dataset: call it again")
        self._passes += 1
        is_first = self._log is None
        saved_at = time.monotonic()

        def save(batches: int, is_complete: bool) -> None:
            if self._checkpoint is not None:
                content = {"batches": batches, "complete": is_complete, "state": state, "log": vars(log)}
                self._checkpoint.save(name, content)

        title = f"pass {self._passes} ({name.partition('-')[0]})"
        with batch_gradients(self.model, self._loss) as evaluate, self._bar(title) as advance:
            # Each pass has another seed, so that a loader that shuffles or augments is detected.
            torch.default_generator.manual_seed(self._passes)
            for count, (x, y) in enumerate(self._batches(log, is_first), 1):
                if count > done:
                    loss, grads = evaluate(x, y)
                    log.check_loss(count - 1, loss.item(), is_first)
                    step(state, grads)
                    del grads  # before the next batch makes its own
                advance()
                if count > done and time.monotonic() - saved_at >= _SAVE_EVERY:
                    save(count, is_complete=False)
                    saved_at = time.monotonic()
        save(len(log.losses), is_complete=True)


def _pair(batch: object, index: int) -> tuple[object, object]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batch {index} of the loader is a {type(batch).__name__}: pass pairs (x, y)")
    return batch[0], batch[1]
