"""Recurrent layers, unrolled into products whose inputs and output gradients are at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import AS_UNIT, ONE_AT_A_TIME, Batch
from .rules import outer
from .shared import Shared
from .taps import Tap

# Of the layers that are unrolled.
FORWARDS = {cls.forward for cls in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)}


class Recurrent(Tap):
    """nn.RNN, nn.LSTM, nn.GRU and their cells.

    The fused kernels keep the gates to themselves, and torch.func does not carry them. Unrolled, every weight is that
    of a product like any linear layer's, with one term per time step.
    """

    def record(self, batch, parameters, args, kwargs):
        if batch.at is None and parameters:
            return self._for_one(parameters, self.unrolled, args, kwargs)
        x, state = self._arguments(*args, **kwargs)
        module = self.module
        is_cell = isinstance(module, nn.RNNCellBase)
        dim = 0 if is_cell or module.batch_first else 1
        if not parameters and isinstance(x, Tensor) and x.ndim == (1 if is_cell else 2):
            return self._of_one_sequence(x, state, dim)
        if not isinstance(x, Tensor) or isinstance(x, Shared) or x.ndim != (2 if is_cell else 3):
            raise TypeError(
                f"module '{self.name}' got {_description(x)}: the capture unrolls {type(module).__name__} over a batch"
                f" of {'vectors (B, n)' if is_cell else 'padded sequences, (B, T, n) or (T, B, n)'}. Pass these instead"
                f" of pack_padded_sequence, and x[None] for one alone; where it is called for each sample, {AS_UNIT};"
                f" or {ONE_AT_A_TIME}"
            )
        state = self._given(state, batch.size_of(x, dim, self.name), 0 if is_cell else 1)
        if is_cell:
            state = self._initial(x, state)
            state = self._step(parameters, "", self._product(parameters, x, "ih", ""), state)
            return state if _kind(module) == "LSTM" else state[0]
        output, state = self._layers(parameters, x.movedim(dim, 0), state)
        return output.movedim(0, dim), state if _kind(module) == "LSTM" else state[0]

    def unrolled(self, *args, **kwargs):
        """The forward, with whatever is in the places of the parameters, for samples in any number."""
        return self.record(Batch(None), {}, args, kwargs)

    def _of_one_sequence(self, x: Tensor, state, dim: int):
        """(T, n), or the vector (n,) of a cell, and states to match, without a batch."""
        at = 0 if isinstance(self.module, nn.RNNCellBase) else 1
        state = pytree.tree_map_only(Tensor, lambda s: s.unsqueeze(at), state)
        result = self.record(Batch(None), {}, (x.unsqueeze(dim), state), {})
        if at == 0:
            return pytree.tree_map(lambda s: s.squeeze(0), result)
        return result[0].squeeze(dim), pytree.tree_map(lambda s: s.squeeze(1), result[1])

    @staticmethod
    def _arguments(input: Tensor, hx=None):  # noqa: A002
        return input, hx

    def _layers(self, parameters, x: Tensor, state) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, T, n) -> (B, T, m) and the last states, each (layers * directions, B, m)."""
        module, last = self.module, []
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(2 if module.bidirectional else 1):
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                current = self._initial(x, state, len(last))
                output, current = self._sequence(parameters, suffix, x, current, reverse=bool(direction))
                outputs.append(output)
                last.append(current)
            x = torch.cat(outputs, -1)
            if layer + 1 < module.num_layers:
                x = F.dropout(x, module.dropout, module.training)
        return x, tuple(torch.stack(states) for states in zip(*last, strict=True))

    def _sequence(self, parameters, suffix: str, x: Tensor, state, reverse: bool):
        products = self._product(parameters, x, "ih", suffix).unbind(1)
        outputs = []
        for product in reversed(products) if reverse else products:
            state = self._step(parameters, suffix, product, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if reverse else outputs, 1), state

    def _initial(self, x: Tensor, state, index: int | None = None) -> tuple[Tensor, ...]:
        """The given state of one layer and direction, or zeros."""
        module = self.module
        if state is not None:
            return state if index is None else tuple(s[index] for s in state)
        hidden = x.new_zeros(x.shape[0], getattr(module, "proj_size", 0) or module.hidden_size)
        return (hidden, x.new_zeros(x.shape[0], module.hidden_size)) if _kind(module) == "LSTM" else (hidden,)

    def _given(self, state, batch_size: int, dim: int) -> tuple[Tensor, ...] | None:
        """The state of the caller, with samples along `dim`."""
        if state is None:
            return None
        module = self.module
        expected = (module.num_layers * (2 if module.bidirectional else 1), batch_size) if dim else (batch_size,)
        states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        for given in states:
            if given.ndim != dim + 2 or given.shape[:-1] != expected:
                raise ValueError(
                    f"module '{self.name}' got an initial state of shape {tuple(given.shape)}: expected"
                    f" ({', '.join(map(str, expected))}, m)"
                )
        return tuple(_of_samples(s, dim) if isinstance(s, Shared) else s for s in states)

    def _step(self, parameters, suffix: str, product: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One time step from the product with the input, in the order of gates of torch.nn."""
        kind, hidden = _kind(self.module), state[0]
        recurrent = self._product(parameters, hidden, "hh", suffix)
        if kind == "LSTM":
            i, f, g, o = (product + recurrent).chunk(4, 1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            if getattr(self.module, "proj_size", 0):
                hidden = self._product(parameters, hidden, "hr", suffix)
            return hidden, cell
        if kind == "GRU":
            (r, z, n), (r_h, z_h, n_h) = product.chunk(3, 1), recurrent.chunk(3, 1)
            new = (n + (r + r_h).sigmoid() * n_h).tanh()
            update = (z + z_h).sigmoid()
            return (new + update * (hidden - new),)
        return ((product + recurrent).relu() if kind == "RELU" else (product + recurrent).tanh(),)

    def _product(self, parameters, x: Tensor, which: str, suffix: str) -> Tensor:
        """x W^T + b with the parameters watched."""
        weight, bias = f"weight_{which}{suffix}", f"bias_{which}{suffix}"
        values = {name: self.module._parameters.get(name) for name in (weight, bias)}
        values |= {name: parameter.detach() for name, parameter in parameters.items() if name in values}
        product = F.linear(x, *values.values())
        watched = {name: parameters[name] for name in (weight, bias) if name in parameters}
        if not watched:
            return product
        return self._watch(watched, x.shape[0], lambda inputs, e: outer(inputs[0], e, weight, bias), product, (x,))


def _of_samples(state: Shared, dim: int) -> Tensor:
    """A state that all samples share, with samples along `dim`: each takes its own from its own copy."""
    return state.copies.diagonal(0, 0, dim + 1).movedim(-1, dim)


def _kind(module: nn.Module) -> str:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    return module.nonlinearity.upper()


def _description(x: object) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
