"""What a proof must not do outside of the model: warn, call hooks of all modules, or fill caches and checkpoints."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules import module

from ..values.loops import loops_of

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def has_global_hooks() -> bool:
    """Whether there are hooks around the forwards or backwards of all modules."""
    return any(getattr(module, name) for name in _GLOBAL_HOOKS)


@contextmanager
def isolated(model: nn.Module, hooks: bool) -> Iterator[None]:
    """Forwards and backwards of a captured model inside leave nothing behind outside of it.

    Args:
        model: the whole model.
        hooks: whether hooks of all modules run.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if not hooks:
            for name in _GLOBAL_HOOKS:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, OrderedDict())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the user's own forward repeats them
        stack.enter_context(loops_of(model).silent())
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # The call is inside of a checkpoint, for example, which counts the tensors that are saved.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield
