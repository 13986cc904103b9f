"""A strategy of Lightning: several processes train a captured LightningModule, without a wrapper around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from ..capture import Preconditioner
from ..capture.captures import handle_of, is_captured
from ..distributed import Group

try:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy
except ModuleNotFoundError:  # only the package under its old name is installed
    from pytorch_lightning import Trainer  # type: ignore[assignment]  # the same classes
    from pytorch_lightning.strategies import DDPStrategy  # type: ignore[assignment]

_NOT_CAPTURED = (
    "parameter '{}' is trained and not captured, so the processes do not exchange its gradient: capture the"
    " LightningModule in configure_optimizers, `rgd_ext.RGD(self, process_group=torch.distributed.group.WORLD)`, or"
    " rgd_ext.precondition, which takes the same argument"
)
_WITHOUT_GROUP = (
    "the model was captured without process_group, so that each of the {} processes would train one of its own: pass"
    " process_group=torch.distributed.group.WORLD to rgd_ext.RGD or rgd_ext.precondition in configure_optimizers"
)


class RGDStrategy(DDPStrategy):
    """Lightning's `DDPStrategy` for a model that `rgd_ext` captures: the capture exchanges gradients, not a wrapper.

    Processes, samplers, checkpoints, precision and logging are those of `DDPStrategy`. The LightningModule is not
    wrapped, so `configure_optimizers` captures it, or the parts of it that are trained, with the group of all
    processes. With `accumulate_grad_batches` each step takes one direction, that of all its micro-batches:
    `handle.defer()` and `handle.write()` are called by the strategy.

    If `lightning` is installed, it is a strategy of `lightning.pytorch`, else of `pytorch_lightning`.

    Args:
        options: of `DDPStrategy`, such as `process_group_backend`, `timeout` and `start_method`; not those of the
            wrapper.

    Raises:
        TypeError: for options of the wrapper.
        ValueError: from `Trainer.fit`, if an optimizer has trainable parameters that are not captured, or a capture has
            no group.
    """

    def __init__(self, **options: Any) -> None:
        refused = [name for name in options if name.startswith(("ddp_", "model_averaging_"))]
        super().__init__(**options)
        refused += self._ddp_kwargs
        if refused:
            raise TypeError(
                f"RGDStrategy got {', '.join(refused)}: options of DistributedDataParallel, which it does not use,"
                " have to be left out"
            )
        self._handles: list[Preconditioner] = []
        self._is_collecting = self._is_deferring = False

    def configure_ddp(self) -> None:
        """Leave the LightningModule unwrapped."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Give all processes the module of rank 0, call `configure_optimizers`, and find what it has captured.

        Raises:
            ValueError: if an optimizer has trainable parameters that are not captured, or a capture has no group.
        """
        module, world = trainer.lightning_module, cast("ProcessGroup", distributed.group.WORLD)
        # DistributedDataParallel would broadcast the whole module; a capture broadcasts what it captures.
        Group(world).broadcast("the module of rank 0", [*module.parameters(), *module.buffers()])
        super().setup_optimizers(trainer)
        self._check_captured(module)
        self._handles = list({handle: None for handle in map(handle_of, module.modules()) if handle is not None})
        if self.world_size > 1 and not all(handle.has_group for handle in self._handles):
            raise ValueError(_WITHOUT_GROUP.format(self.world_size))
        self._is_collecting = self._is_deferring = False

    def _check_captured(self, module: nn.Module) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for parameter in (parameter for group in groups for parameter in group["params"]):
            if parameter.requires_grad and not is_captured(parameter):
                raise ValueError(_NOT_CAPTURED.format(names.get(parameter, tuple(parameter.shape))))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backwards inside are collected for the direction that the first backward after the block writes."""
        for handle in self._handles:
            handle.defer()
        self._is_collecting = self._is_deferring = True
        try:
            yield
        finally:
            self._is_collecting = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Write what was collected, before gradients are unscaled and clipped."""
        if self._is_deferring and not self._is_collecting:
            # In the next step backwards write by themselves again, and exchange gradients while they run.
            for handle in self._handles:
                handle.write()
                handle.defer(False)
            self._is_deferring = False

    def teardown(self) -> None:
        """Forget what a training that has stopped between two steps has collected."""
        if self._is_deferring:
            for handle in self._handles:
                handle.drop()
                handle.defer(False)
            self._is_deferring = False
        super().teardown()
