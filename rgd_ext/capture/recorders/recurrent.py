"""The recorder of recurrent layers, which are unrolled into products whose inputs and output gradients are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...layers.linear import outer
from ..batch import AS_UNIT, ONE_AT_A_TIME, Batch
from ..values.shared_tensor import SharedTensor
from .recorder import Recorder

# The forwards of the layers that are unrolled.
FORWARDS = {cls.forward for cls in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)}


class RecurrentRecorder(Recorder):
    """Records nn.RNN, nn.LSTM, nn.GRU and their cells.

    The fused kernels do not return the gates, and torch.func does not support them. In the unrolled layer every weight
    is that of a linear layer, with one term per time step.
    """

    def record(self, batch, parameters, args, kwargs):
        if batch.batch_dim is None and parameters:
            return self._run_with_copies(parameters, self.unrolled, args, kwargs)
        x, state = self._arguments(*args, **kwargs)
        module = self.module
        is_cell = isinstance(module, nn.RNNCellBase)
        dim = 0 if is_cell or module.batch_first else 1
        if not parameters and isinstance(x, Tensor) and x.ndim == (1 if is_cell else 2):
            return self._of_one_sequence(x, state, dim)
        if not isinstance(x, Tensor) or isinstance(x, SharedTensor) or x.ndim != (2 if is_cell else 3):
            raise TypeError(
                f"module '{self.name}' got {_description(x)}: the capture unrolls {type(module).__name__} over a batch"
                f" of {'vectors (B, n)' if is_cell else 'padded sequences, (B, T, n) or (T, B, n)'}. Pass these instead"
                f" of pack_padded_sequence, and x[None] for one alone; where it is called for each sample, {AS_UNIT};"
                f" or {ONE_AT_A_TIME}"
            )
        state = self._checked_state(state, batch.checked_size(x, dim, self.name), 0 if is_cell else 1)
        if is_cell:
            state = self._initial(x, state)
            state = self._step(parameters, "", self._product(parameters, x, "ih", ""), state)
            return state if _kind(module) == "LSTM" else state[0]
        output, state = self._layers(parameters, x.movedim(dim, 0), state)
        return output.movedim(0, dim), state if _kind(module) == "LSTM" else state[0]

    def unrolled(self, *args, **kwargs):
        """The output of the forward, unrolled and not recorded, for any number of samples."""
        return self.record(Batch(None), {}, args, kwargs)

    def _of_one_sequence(self, x: Tensor, state, dim: int):
        """The output for one sequence (T, n), or for a cell one vector (n,), with states to match."""
        state_dim = 0 if isinstance(self.module, nn.RNNCellBase) else 1
        state = pytree.tree_map_only(Tensor, lambda s: s.unsqueeze(state_dim), state)
        result = self.record(Batch(None), {}, (x.unsqueeze(dim), state), {})
        if state_dim == 0:
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
        """The outputs (B, T, m) and the last state of one layer and direction."""
        products = self._product(parameters, x, "ih", suffix).unbind(1)
        outputs = []
        for product in reversed(products) if reverse else products:
            state = self._step(parameters, suffix, product, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if reverse else outputs, 1), state

    def _initial(self, x: Tensor, state, index: int | None = None) -> tuple[Tensor, ...]:
        """The initial state of one layer and direction: from `state`, or zeros if that is None."""
        module = self.module
        if state is not None:
            return state if index is None else tuple(s[index] for s in state)
        hidden = x.new_zeros(x.shape[0], getattr(module, "proj_size", 0) or module.hidden_size)
        return (hidden, x.new_zeros(x.shape[0], module.hidden_size)) if _kind(module) == "LSTM" else (hidden,)

    def _checked_state(self, state, batch_size: int, dim: int) -> tuple[Tensor, ...] | None:
        """The initial state that the caller passed, with the samples along `dim`."""
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
        return tuple(_unshared(s, dim) if isinstance(s, SharedTensor) else s for s in states)

    def _step(self, parameters, suffix: str, product: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state, given the product of the input with its weight; gates are in the order of torch.nn."""
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
        """x W^T + b, tied to the trainable parameters."""
        weight, bias = f"weight_{which}{suffix}", f"bias_{which}{suffix}"
        values = {name: self.module._parameters.get(name) for name in (weight, bias)}
        values |= {name: parameter.detach() for name, parameter in parameters.items() if name in values}
        product = F.linear(x, *values.values())
        watched = {name: parameters[name] for name in (weight, bias) if name in parameters}
        if not watched:
            return product
        call = self._make_call(watched, x.shape[0], lambda inputs, e: outer(inputs[0], e, weight, bias))
        return self._watch(call, product, (x,))


def _unshared(state: SharedTensor, dim: int) -> Tensor:
    """A shared tensor that has the states of all samples along `dim`, with each sample's state from its own copy."""
    return state.copies.diagonal(0, 0, dim + 1).movedim(-1, dim)


def _kind(module: nn.Module) -> str:
    """LSTM, GRU, or the nonlinearity of an RNN: TANH or RELU."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    return module.nonlinearity.upper()


def _description(x: object) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
