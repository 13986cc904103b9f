"""Per-sample gradients of a data set, a batch at a time: passes that are checked, resumable and watched."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch_norm import batch_norms, check_frozen
from .capture.batch import tensors_in
from .capture.collect import collecting
from .checkpoint import Checkpoint, fingerprint
from .gradients import PerSampleGradients
from .per_sample_loss import PerSampleLoss

# What a pass adds up, and how a batch adds to it, in place.
State = dict[str, Tensor]
Step = Callable[[State, PerSampleGradients], None]

# Between two writes of an unfinished pass, in seconds.
_SAVE_EVERY = 60.0
# The same loss twice, on any device.
_SAME_LOSS = 1e-4


@contextmanager
def batch_gradients(
    model: nn.Module, loss_fn: Callable[[object, object], Tensor] | PerSampleLoss
) -> Iterator[Callable[[object, object], tuple[Tensor, PerSampleGradients]]]:
    """Yields a function from a batch (x, y) to its mean loss and the gradients g_i of its per-sample losses.

    The model, its `.grad`, its capture if it has one, and the states of random number generators are as before
    afterwards.
    """
    _check_type(model)
    remedies = "call model.eval(), or replace it with rgd_ext.convert_batch_norm(model)"
    check_frozen(batch_norms(model), remedies)
    mean_loss = loss_fn if isinstance(loss_fn, PerSampleLoss) else PerSampleLoss(loss_fn)
    device = next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), collecting(model) as gradients:

        @torch.enable_grad()
        def evaluate(x: object, y: object) -> tuple[Tensor, PerSampleGradients]:
            x, y = _moved(x, device), _moved(y, device)
            batch_size = next((t.shape[0] for t in tensors_in(x) if t.ndim), 0)
            if batch_size == 0:
                raise ValueError("a batch has no samples: pass tensors with at least one along dimension 0")
            loss = mean_loss(_called(model, x), y, batch_size)
            return loss.detach(), gradients(loss, batch_size)

        yield evaluate


def _check_type(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


def _moved(tree: object, device: torch.device) -> object:
    return pytree.tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, tree)


def _called(model: nn.Module, x: object) -> object:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


class Held:
    """Per-sample gradients that are all there: a pass is one step."""

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
        progress: whether to show a bar on standard error.

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
        _check_type(model)
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
        self._progress = _rich_progress if progress else _no_progress
        self._weights = self._fingerprint()
        # Of every batch of the first pass: a hash of the data, and the loss.
        self._log: list[tuple[str, float]] | None = None
        self._passes = 0
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, self._weights)

    def _fingerprint(self) -> str:
        return fingerprint([type(self.model).__qualname__, self.model.state_dict()])

    def __len__(self) -> int:
        """The number of batches; TypeError where the loader does not know."""
        return len(self.loader) if self._log is None else len(self._log)

    @torch.no_grad()
    def seconds(self, state: State, step: Step) -> float:
        """Time of a pass, from that of its first batch."""
        with batch_gradients(self.model, self._loss) as evaluate:
            x, y = _pair(next(iter(self.loader)), 0)
            return len(self) * _timed(lambda: step(state, evaluate(x, y)[1]))

    @torch.no_grad()
    def fold(self, name: str, state: State, step: Step) -> State:
        """`state` after a step for each batch; from the checkpoint, as far as it goes.

        Raises:
            RuntimeError: if the batches, the weights or the losses differ from those of the first pass.
        """
        saved = None if self._checkpoint is None else self._checkpoint.load(name)
        done, log = 0, self._log
        if saved is not None:
            done, log = saved["batches"], self._log or saved["log"]
            state = {key: value.to(state[key].device) for key, value in saved["state"].items()}
            if self._log is None:
                self._check_owner(log[0])
        is_complete = saved is not None and saved["complete"]
        if not is_complete:
            log = self._pass(name, state, step, done, log or [])
        self._log, self._loss.is_trusted = log, True
        return state

    def _check_owner(self, first: tuple[str, float]) -> None:
        """Compare the first batch with that of the checkpoint."""
        with batch_gradients(self.model, self._loss) as evaluate:
            x, y = _pair(next(iter(self.loader)), 0)
            if fingerprint((x, y)) == first[0] and _agree(evaluate(x, y)[0].item(), first[1]):
                return
        raise ValueError(
            f"checkpoint {self._checkpoint.folder} belongs to other data or another loss, or the loader shuffles: pass"
            " another path, or shuffle=False"
        )

    def _pass(self, name: str, state: State, step: Step, done: int, log: list[tuple[str, float]]):
        if self._fingerprint() != self._weights:
            raise RuntimeError("the model's weights have changed since DiffusionMatrix.from_dataset: call it again")
        is_first, log = self._log is None, list(log)
        self._passes += 1
        count, written = 0, time.monotonic()

        def save(is_complete: bool) -> None:
            content = {"batches": count, "complete": is_complete, "state": state, "log": log if is_first else None}
            self._checkpoint.save(name, content)

        with batch_gradients(self.model, self._loss) as evaluate, self._progress(self, name) as advance:
            # Each pass has its own seed, so that a loader that shuffles or augments is noticed.
            torch.default_generator.manual_seed(self._passes)
            for x, y in map(_pair, self.loader, itertools.count()):
                digest = fingerprint((x, y))
                is_new = is_first and count == len(log)
                if not is_new and (count >= len(log) or digest != log[count][0]):
                    raise RuntimeError(
                        f"batch {count} differs from that of the first pass: the loader shuffles or augments; use"
                        " shuffle=False, the same batch size, and no random transforms"
                    )
                if count >= done:
                    loss, grads = evaluate(x, y)
                    if is_new:
                        log.append((digest, loss.item()))
                    elif not _agree(loss.item(), log[count][1]):
                        raise RuntimeError(
                            f"the loss of batch {count} is {loss.item():.6g}, in the first pass it was"
                            f" {log[count][1]:.6g}: the model or the loss is random; switch that off"
                        )
                    step(state, grads)
                    del grads
                count += 1
                advance()
                if self._checkpoint is not None and count > done and time.monotonic() - written >= _SAVE_EVERY:
                    save(is_complete=False)
                    written = time.monotonic()
        if count == 0:
            raise ValueError("loader is empty: pass at least one batch (x, y)")
        if count < len(log):
            raise RuntimeError(
                f"the loader gave {count} batches, but {len(log)} in the first pass: use the same data in every pass"
            )
        if self._checkpoint is not None:
            save(is_complete=True)
        return log


def _pair(batch: object, index: int) -> tuple[object, object]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batch {index} of the loader is a {type(batch).__name__}: pass pairs (x, y)")
    return batch[0], batch[1]


def _agree(loss: float, before: float) -> bool:
    return math.isclose(loss, before, rel_tol=_SAME_LOSS, abs_tol=1e-12)


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


@contextmanager
def _no_progress(stream: Stream, name: str) -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _rich_progress(stream: Stream, name: str) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        try:
            total = len(stream)
        except TypeError:
            total = None
        task = bar.add_task(f"pass {stream._passes}, {name}", total=total)
        yield lambda: bar.advance(task)
