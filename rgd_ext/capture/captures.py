"""Captures of models: making one, and finding those that there are."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch_norm import REMEDIES_FOR_RESIDUALS, batch_norms, check_frozen
from ..contributions.buffers import KEPT_BYTES
from ..distributed import (
    MODES,
    Exchange,
    Group,
    Mode,
    ModelParameters,
    ProcessGroupLike,
    agree,
    as_process_group,
    has_dtensors,
)
from ..metric import Epsilon, Inverse, Observation, Rule, Weights, checked_rule
from .context import Options
from .handle import Preconditioner
from .model_checks import check_model, check_model_of_group
from .wrappers import NEEDS_WHOLE, Wrapper, check_not_sharded, warn_of_processes

_UNVERIFIED = (
    "the capture of a sharded model is not verified: call rgd_ext.verify(model, x) before fully_shard, or with"
    " a smaller model from the same code, and pass verify=False to precondition, RGD or observe"
)
_handles: weakref.WeakSet[Preconditioner] = weakref.WeakSet()


def _live() -> list[Preconditioner]:
    """The handles whose captures have not been removed."""
    return [handle for handle in _handles if not handle.context.is_removed]


def live_handle(model: nn.Module) -> Preconditioner | None:
    """The handle that captures `model` itself, or None."""
    return next((handle for handle in _live() if handle.model is model), None)


def handle_of(module: nn.Module) -> Preconditioner | None:
    """The handle of the capture that `module` is in: its own, or that of a model around it; None without one.

    Args:
        module: as it is, or as `DistributedDataParallel` or `torch.compile` wraps it.

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
    if isinstance(module, DistributedDataParallel):
        module = module.module
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    return live_handle(module) or next((handle for handle in _live() if handle.recorder_of(module) is not None), None)


def _check_free(model: nn.Module, earlier: Preconditioner | None) -> None:
    captured = {module for handle in _live() if handle is not earlier for module in handle.recorded_modules()}
    for name, module in model.named_modules():
        if module in captured:
            place = f"module '{name}' of the model" if name else f"the model ({type(model).__name__})"
            raise ValueError(
                f"{place} is captured already, by the handle that rgd_ext.handle_of(module) returns: use that handle,"
                " and RGD(model.parameters(), ...) for an optimizer; or call its .remove() first"
            )


def is_captured(parameter: Tensor) -> bool:
    """Whether a live capture writes the gradient of `parameter`."""
    return any(handle.captures(parameter) for handle in _live())


def precondition(
    model: nn.Module,
    *,
    epsilon: Epsilon | None = None,
    inverse: Inverse | None = None,
    weights: Weights | None = None,
    batch_norm: Literal["error", "contribution"] = "error",
    memory_budget: float | None = None,
    verify: bool = True,
    batch_dim: int | None = 0,
    process_group: ProcessGroupLike | None = None,
    mode: Mode = "exact",
) -> Preconditioner:
    """Make every `backward()` through `model` add the RGD direction, or that of `weights`, to `.grad`.

    At the end of each backward, `.grad` has (I - eps D) g added to it, eq. (10), where autograd would have added g; g_i
    is sample i's part of the gradient of the loss times the batch size, whatever the reduction of the loss. Samples lie
    along dimension `batch_dim` of the model's first tensor argument. The model keeps its type, names and state_dict;
    copies and pickles of it are ordinary models.

    Args:
        model: at least one trainable parameter; not captured already, nor any of its modules. Only a capture that
            `RGD(model)` made is taken over, and that optimizer refuses to step from then on.
        epsilon: a policy, a number (`Fixed`), or a callable from the `Statistics` of the batch to epsilon; by default
            `Spectral(0.5)`. Under a `torch.amp.GradScaler` they are those of the scaled loss: pass
            `Fixed(value, loss_scale=scaler.get_scale)` for a constant, and divide in a callable of yours by the square
            of the scale.
        inverse: "weak-field", the default, for I - eps D, "exact" for (I + eps D)^-1.
        weights: in place of both, a weighting rule: a callable from these statistics to w, (B,), such as those of
            `rgd_ext.weights`; `.grad` then gets sum_i w_i g_i. On the CPU weights that are not finite are an error,
            unless the gradients are not finite either; on a GPU, where the check would wait for the device, `.grad`
            gets them.
        batch_norm: batch normalisation in training mode couples the samples. "error" refuses it; "contribution" takes
            the batch's statistics as part of the layer: g_i is then sample i's contribution to the exact gradient.
        memory_budget: bytes that per-sample gradients, or layers' inputs and output gradients in their place, may take
            at the end of a backward; the first backward with new shapes takes the least. None lets the gradients of
            a layer take three times what its inputs and output gradients take, and `math.inf` as much as the fastest
            way takes; with these two up to 16 MiB are kept from step to step, on the CPU.
        verify: prove on the model's own batches, before the first direction of each kind of call, that every sample
            gets its own gradient; see `rgd_ext.verify`. The forward raises ValueError if not. False for a model whose
            forward has effects outside of the model, since it is called several times. Sharded models are not verified,
            with a warning.
        batch_dim: the dimension of the samples in the first tensor of the model's arguments: 1 for models that take
            time first, (T, B, ...). Other tensors, and those inside of the model, have them there or along dimension 0.
            None takes every call for one sample, whatever its arguments are: slow, exact, and the last remedy where
            nothing tells samples apart. Call the model and backward() for each inside `with handle.accumulate():`.
        process_group: the processes that train the model together, each on its own part of the batch: a
            `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dimension. All of them call this function, and
            start from the parameters of rank 0. `.grad` is then the same in all of them after each backward: the
            direction of all their samples, for the mean of their losses. Statistics are those of all samples, rank by
            rank. Two gradients are exchanged in each backward; with `Spectral`, the default, up to some thirty, unless
            you pass `Spectral(every=20)` or `Spectral(across_ranks="bound")`. The model may be sharded over them by
            `fully_shard`: shards keep their values, and `.grad` of each sharded parameter is a `DTensor`. None for one
            process; for a
            `DistributedDataParallel`, in whose place its module is captured, its own.
        mode: "exact" as above; "local" lets each process take its own samples for all, and gives `.grad` the mean of
            their directions, which is another direction at half of the traffic.

    Returns:
        The handle, which has `stats`, `align()`, `record()`, `plan()`, `paused()`, `accumulate()`, `defer()` and
        `remove()`, and is a context manager.

    Raises:
        TypeError: if `model` is not a module, `epsilon` not a policy, `weights` not a callable or given together
            with `epsilon` or `inverse`, `verify` not a bool, or `batch_dim` no int.
        ValueError: for arguments out of range, a model without trainable parameters or with uninitialised ones, a
            second capture, or batch normalisation in training mode; if the processes capture different models, or with
            different options; for parameters that are distributed otherwise than by `fully_shard`.
        RuntimeError: if another process of the group does not call this function, or fails.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with rgd_ext.precondition(model, epsilon=rgd_ext.Rayleigh(0.3)) as handle:
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> handle.stats.batch_size
        8
    """
    rule = checked_rule(epsilon, inverse, weights)
    options = _options(batch_norm, memory_budget, batch_dim)
    return _capture_of_processes(model, process_group, mode, rule=rule, options=options, verify=verify)


def observe(
    model: nn.Module,
    *,
    gram: bool = False,
    per_parameter: bool = False,
    batch_norm: Literal["error", "contribution"] = "error",
    memory_budget: float | None = None,
    verify: bool = True,
    batch_dim: int | None = 0,
    process_group: ProcessGroupLike | None = None,
) -> Preconditioner:
    """Have every `backward()` through `model` leave the plain gradient in `.grad`, and statistics in `.stats`.

    The statistics are those that need no Gramian: the norms of gradients and of their differences from the mean, the
    alignments, tr D, the noise scale. The Gramian, the eigenvalues and the rank of D are None where layers do not give
    the Gramian anyway, unless `gram` is True.

    Args:
        gram: whether to compute the Gramian.
        per_parameter: whether to compute `stats.per_parameter`, a mapping from the names of parameters to the
            `grad_norm`, `trace` and `noise_scale` of their part of the gradient; its `by_module()` has those of
            modules. A union of batches, some of which do not use a parameter that others use, is a RuntimeError then.
        model, batch_norm, memory_budget, verify, batch_dim, process_group: as for `precondition`.

    Returns:
        The handle, as from `precondition`; `.stats.epsilon` is None, and the weights are 1/B. `.grad` has the bits that
        `precondition(model, epsilon=0.0)` gives it, but for subnormal numbers.

    Raises:
        TypeError, ValueError: as `precondition`; TypeError if `gram` or `per_parameter` is not a bool.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> with rgd_ext.observe(model) as handle:
        ...     model(torch.randn(8, 3)).square().mean().backward()
        >>> handle.stats.sample_norms.shape
        torch.Size([8])
    """
    _check_flag("gram", gram)
    _check_flag("per_parameter", per_parameter)
    rule = Observation("gram" if gram else "norms")
    options = _options(batch_norm, memory_budget, batch_dim)
    found: dict[str, Any] = {"rule": rule, "options": options, "verify": verify, "per_parameter": per_parameter}
    return _capture_of_processes(model, process_group, "exact", **found)


def capture_alone(model: nn.Module, *, verify: bool, batch_dim: int | None = 0) -> Preconditioner:
    """A capture whose backwards are for this process alone, whatever other processes there are.

    Args:
        model, verify, batch_dim: as for `precondition`; a `DistributedDataParallel` is refused.

    Raises:
        TypeError, ValueError: as `precondition`.
    """
    if isinstance(model, nn.Module):
        check_not_sharded(model, NEEDS_WHOLE)
    return _capture(model, checked_rule(None, None, None), _options("error", None, batch_dim), verify)


def capture_residuals(model: nn.Module, memory_budget: float | None, is_unit: bool) -> Preconditioner:
    """A capture of a model whose outputs may be differentiated with respect to its inputs; it is paused.

    Args:
        model, memory_budget: as for `observe`.
        is_unit: whether the model is captured as one unit.

    Raises:
        TypeError, ValueError: as `observe`.
    """
    if isinstance(model, nn.Module):
        check_frozen(batch_norms(model), REMEDIES_FOR_RESIDUALS)
    budget = _checked_budget(memory_budget)
    options = Options("error", 0, budget, _kept(budget), derivatives=True, is_unit=is_unit)
    handle = _capture(model, Observation("norms"), options, verify=False)
    handle.context.native.pause()
    return handle


def _options(
    batch_norm: Literal["error", "contribution"], memory_budget: float | None, batch_dim: int | None
) -> Options:
    """Options of a user, checked."""
    if batch_norm not in ("error", "contribution"):
        raise ValueError(f"batch_norm is {batch_norm!r}: choose 'error' or 'contribution'")
    budget = _checked_budget(memory_budget)
    return Options(batch_norm, _checked_dim(batch_dim), budget, _kept(budget))


def _kept(budget: float | None) -> int:
    return KEPT_BYTES if budget in (None, math.inf) else 0


def _capture_of_processes(
    model: nn.Module, process_group: ProcessGroupLike | None, mode: Mode, **options: Any
) -> Preconditioner:
    """A capture with the processes of a group, if one is passed or `model` is wrapped for one; see `_capture`."""
    wrapper = Wrapper(model) if isinstance(model, DistributedDataParallel) else None
    if wrapper is not None:
        if process_group is not None and as_process_group(process_group) != wrapper.process_group:
            raise ValueError(
                "process_group is another one than that of the DistributedDataParallel: leave it out, or capture its"
                " module"
            )
        model, process_group = wrapper.module, wrapper.process_group
    if mode not in MODES or (mode != "exact" and process_group is None):
        raise ValueError(f"mode is {mode!r}: choose 'exact', or 'local' together with a process_group")
    if process_group is None:
        warn_of_processes()
        return _capture(model, **options)
    return _capture(model, **options, group=Group(process_group), mode=mode, wrapper=wrapper)


def _capture(
    model: nn.Module,
    rule: Rule,
    options: Options,
    verify: bool,
    per_parameter: bool = False,
    group: Group | None = None,
    mode: Mode = "exact",
    wrapper: Wrapper | None = None,
) -> Preconditioner:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")
    earlier = next((handle for handle in _live() if handle.model is model and handle.has_owner), None)
    _check_free(model, earlier)
    check_model(model, options.batch_norm)
    _check_flag("verify", verify)
    exchange, parameters = None, ModelParameters(model)
    is_split = group is not None and has_dtensors(model)
    if not is_split:
        check_not_sharded(model)
    if group is not None:
        check_model_of_group(model)
        same = {
            "the rule": (rule, rule.needs, rule.only_sample_norms),
            "batch_norm": options.batch_norm,
            "batch_dim": options.batch_dim,
        }
        token = agree(group, model, same | {"verify": verify, "mode": mode, "per_parameter": per_parameter})
        if is_split:
            parameters, verify = _sharded(model, group, verify), False
        exchange = Exchange(group, mode, parameters, token, wrapper is None or wrapper.shares_buffers)
    if earlier is not None:
        earlier.give_way()
    handle = Preconditioner(parameters, rule, options, verify, per_parameter, exchange, wrapper)
    _handles.add(handle)
    return handle


def _sharded(model: nn.Module, group: Group, verify: bool) -> ModelParameters:
    # torch takes a second to import what this needs.
    from ..distributed.sharded_parameters import ShardedParameters

    if verify:
        warnings.warn(_UNVERIFIED, stacklevel=5)
    return ShardedParameters(model, group)


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: pass True or False")


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
