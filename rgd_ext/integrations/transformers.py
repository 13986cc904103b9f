"""The Trainer of transformers along the RGD direction, and a callback that logs the statistics of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import transformers
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]  # it has no annotations
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..capture import Preconditioner, precondition
from ..capture.captures import handle_of
from ..metric.recorded import RunningRecord

_OWN_CAPTURE = (
    "the optimizer in `optimizers` is of type {}, which captures a model itself: leave it out, and pass"
    " optimizer_cls_and_kwargs=(torch.optim.SGD, options of SGD), and options of the capture as precondition={{...}}"
)
_CAPTURED = (
    "the {} is captured already, and RGDTrainer captures it itself, with the options precondition={{...}}: call"
    " rgd_ext.handle_of(model).remove() before the training"
)
_SHARDED = (
    "RGDTrainer got arguments with deepspeed or fsdp, with which it does not train: leave them out; docs/distributed.md"
    " has sharded models, under a loop of your own"
)
_NOT_CAPTURED = (
    "StatsCallback logs statistics of a captured model, and the {} of this Trainer is not captured: use RGDTrainer, or"
    " call rgd_ext.observe(model) before the training"
)
_OPTIONS = sorted(signature(precondition).parameters.keys() - {"model", "process_group"})


def _handle_of(trainer: transformers.Trainer) -> Preconditioner | None:
    return handle_of(cast("nn.Module", trainer.model))


class RGDTrainer(transformers.Trainer):
    """The Trainer, whose optimizer steps along the RGD direction, in one process or in several.

    The model is captured where the Trainer makes its optimizer, which may be any; that of `rgd_ext.RGD` is
    `optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})`, or `optim="sgd"` in the arguments
    without momentum. Each step takes one direction, that of all its micro-batches, which is written before gradients
    are unscaled and clipped. Checkpoints have what the policy remembers, in the state of the optimizer. The model
    stays captured after the training, and every backward then writes its own direction, until
    `rgd_ext.handle_of(model).remove()`, or until another `RGDTrainer` trains it. Several may train a model in turn.

    For other trainers than the Trainer, derive from both: `class RGDSeq2SeqTrainer(RGDTrainer, Seq2SeqTrainer): pass`.

    Args:
        args, others: of the Trainer.
        precondition: options of `rgd_ext.precondition`, such as {"epsilon": rgd_ext.Rayleigh(0.3)}, but for
            `process_group`, which is that of all processes.

    Raises:
        TypeError: if `precondition` has other options; from `train`, as `rgd_ext.precondition`.
        ValueError: from `train`, for an optimizer that captures a model itself, for a model that is captured already,
            for arguments with `deepspeed` or `fsdp`, or as `rgd_ext.precondition`.
    """

    def __init__(self, *args: Any, precondition: Mapping[str, Any] | None = None, **others: Any) -> None:
        options = {} if precondition is None else precondition
        if not isinstance(options, Mapping) or options.keys() - {*_OPTIONS}:
            raise TypeError(f"precondition is {options!r}: pass a dict with options of {', '.join(_OPTIONS)}")
        super().__init__(*args, **others)
        self._options = dict(options)
        self._handle: Preconditioner | None = None
        self._remembering: Optimizer | None = None  # the one whose state has what the policy remembers

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The training of the Trainer.

        Raises:
            ValueError, TypeError: see the class.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._handle is not None:
                self._handle.drop()  # what a training that was stopped within a step has collected
                self._handle.defer(False)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Capture the model, unless an earlier training did, and make the optimizer as the Trainer does.

        Raises:
            ValueError, TypeError: see the class.
        """
        earlier = _handle_of(self)
        handle = self._captured(earlier) if earlier is None or earlier is not self._handle else earlier
        handle.defer()
        optimizer = super().create_optimizer(*args, **kwargs)
        own: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        handle.belongs_to(own)
        self._handle = handle
        if own is not self._remembering:
            own.register_state_dict_post_hook(self._add_memory)
            own.register_load_state_dict_pre_hook(self._take_memory)
            self._remembering = own
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The step of the Trainer for one micro-batch; after the last one the direction of all is in `.grad`."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._handle is not None and self.accelerator.sync_gradients:
            self._handle.write()
        return loss

    def _captured(self, earlier: Preconditioner | None) -> Preconditioner:
        if getattr(self.optimizer, "preconditioner", None) is not None:
            raise ValueError(_OWN_CAPTURE.format(type(self.optimizer).__name__))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(_SHARDED)
        if earlier is not None and not earlier.has_owner:
            raise ValueError(_CAPTURED.format(type(self.model).__name__))
        model, group = cast("nn.Module", self.model), None
        if distributed.is_available() and distributed.is_initialized():
            # The wrapper has to be there before the capture. `prepare` leaves out one that it takes for superfluous,
            # as after an evaluation: hence the group.
            model = self.model_wrapped = self.accelerator.prepare(self.model)
            group = distributed.group.WORLD
        return precondition(model, process_group=group, **self._options)

    def _add_memory(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        memory = {} if self._handle is None else self._handle.state_dict()
        return state | ({"preconditioner": memory} if memory else {})

    def _take_memory(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if self._handle is not None:
            self._handle.load_state_dict(state.get("preconditioner", {}))
        return {name: value for name, value in state.items() if name != "preconditioner"}


class StatsCallback(transformers.TrainerCallback):
    """Logs the statistics of the last direction with every loss that a Trainer logs, as a row of their own.

    They reach `trainer.state.log_history`, TensorBoard and whatever else the Trainer reports to. Their names are
    "rgd/" and those of the columns of `rgd_ext.Monitor`; the noise scale is from running means over the rows. Under a
    GradScaler they are those of the scaled loss. If the model was captured by `rgd_ext.observe`, with gradient
    accumulation, they are those of the last micro-batch.

    Args:
        trainer: an `RGDTrainer`, or another Trainer of a model that is captured; add the callback to it by
            `trainer.add_callback(StatsCallback(trainer))`.

    Raises:
        TypeError: if `trainer` is no Trainer.
        ValueError: from `train`, if the model is not captured.
    """

    def __init__(self, trainer: transformers.Trainer | None = None) -> None:
        if not isinstance(trainer, transformers.Trainer):
            raise TypeError(f"trainer is {trainer!r}: pass the Trainer, trainer.add_callback(StatsCallback(trainer))")
        self._trainer, self._record = trainer, RunningRecord()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Check that the model is captured.

        Raises:
            ValueError: if not.
        """
        if _handle_of(self._trainer) is None:
            raise ValueError(_NOT_CAPTURED.format(type(self._trainer.model).__name__))

    def on_log(self, *args: Any, logs: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Log the statistics after a loss."""
        handle = _handle_of(self._trainer)
        # Not after evaluations and at the end, nor after its own row.
        if logs is not None and "loss" in logs and handle is not None and handle.stats is not None:
            self._trainer.log(self._record.of(handle.stats))
