"""For Lightning: a callback that trains a captured LightningModule, and a strategy for several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from ..capture import Preconditioner
from ..capture.captures import handle_of, is_captured
from ..distributed import Group
from ..metric.recorded import RunningRecord

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
except ModuleNotFoundError:  # only the package under its old name is installed
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]  # the same classes
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
_NOTHING_CAPTURED = (
    "RGDCallback finds no captured module in the {}: capture it in configure_optimizers, `rgd_ext.RGD(self, lr=0.1)`,"
    " or rgd_ext.precondition"
)
_DEFERS = (
    "the handle of the {} defers, and RGDCallback calls defer() and write() itself: leave out your calls of both, or"
    " leave out the callback"
)
_UNSCALED_FIRST = (
    "RGDCallback with accumulate_grad_batches={} and precision '{}', with which Lightning unscales gradients before a"
    " callback can write them: pass strategy=RGDStrategy(), which writes them earlier, also in one process; or"
    " precision='bf16-mixed'"
)


def _handles_of(module: nn.Module) -> dict[Preconditioner, str]:
    """The handles of a module and of its parts, with the name of the part that each of them captures."""
    found = ((handle_of(part), name) for name, part in module.named_modules())
    # Parts come after what contains them: reversed, so that the name of the outermost stays.
    return {handle: name for handle, name in reversed([*found]) if handle is not None}


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
        self._handles = list(_handles_of(module))
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


class RGDCallback(Callback):
    """Has each step of Lightning take one direction, that of all its micro-batches, and logs its statistics.

    With `accumulate_grad_batches` backwards only collect, and the direction of their union is written before gradients
    are clipped; with `RGDStrategy` the strategy does that. The statistics reach the loggers of the Trainer in each step
    in which it logs, by the names "rgd/" and those of the columns of `rgd_ext.Monitor`; those of a captured part "net"
    begin with "rgd/net/". The noise scale is from running means over these steps. Under a GradScaler they are those of
    the scaled loss.

    In manual optimization `handle.defer()` and `handle.write()` are yours to call, before the step of the optimizer.

    Raises:
        ValueError: from `Trainer.fit`, if nothing in the LightningModule is captured, if a handle defers already, or
            for accumulation with a GradScaler, as with precision="16-mixed".
    """

    def __init__(self) -> None:
        self._records: dict[Preconditioner, tuple[str, RunningRecord]] = {}
        self._is_deferring = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is captured.

        Raises:
            ValueError: see the class.
        """
        names = _handles_of(pl_module)
        if not names:
            raise ValueError(_NOTHING_CAPTURED.format(type(pl_module).__name__))
        if pl_module.automatic_optimization and any(handle.is_deferring for handle in names):
            raise ValueError(_DEFERS.format(type(pl_module).__name__))
        parts = {handle: f"{name.replace('.', '/')}/" if name else "" for handle, name in names.items()}
        self._records = {handle: (part, RunningRecord()) for handle, part in parts.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Have backwards collect where the Trainer accumulates, which may change from epoch to epoch.

        Raises:
            ValueError: for accumulation with a GradScaler.
        """
        accumulates = trainer.accumulate_grad_batches > 1 and not isinstance(trainer.strategy, RGDStrategy)
        if accumulates == self._is_deferring:
            return
        if accumulates and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(_UNSCALED_FIRST.format(trainer.accumulate_grad_batches, trainer.precision))
        self._defer(accumulates)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write what was collected, and log the statistics."""
        every = cast("int", trainer.log_every_n_steps)  # type: ignore[attr-defined]  # which Lightning sets elsewhere
        # In manual optimization Lightning counts batches, not steps, and logs the last values that it was given.
        is_logged = every > 0 and (not pl_module.automatic_optimization or (trainer.global_step + 1) % every == 0)
        for handle, (part, record) in self._records.items():
            if self._is_deferring:
                handle.write()
            if is_logged and handle.stats is not None:
                pl_module.log_dict(record.of(handle.stats, part))

    def on_train_end(self, *args: Any) -> None:
        """Forget what a training that has stopped between two steps has collected."""
        if self._is_deferring:
            for handle in self._records:
                handle.drop()
            self._defer(False)
        self._records = {}

    def on_exception(self, *args: Any) -> None:
        """As `on_train_end`."""
        self.on_train_end()

    def _defer(self, on: bool) -> None:
        for handle in self._records:
            handle.defer(on)
        self._is_deferring = on
