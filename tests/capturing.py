"""What the tests of the capture have in common, and all of its internals that tests reach into."""

from functools import partial

import pytest
import torch
from models import Net
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext
from rgd_ext._binary import _C
from rgd_ext.capture.native import LayerCall, NativeContext, native_spec
from rgd_ext.capture.verification.proof import Proof
from rgd_ext.layers import registry
from rgd_ext.layers.norm import layer_norm, layer_norm_spec

B = 6


def loss_of(output):
    """A mean over samples whose derivatives differ from sample to sample."""
    return output.sin().square().mean()


def captured_grad(model, *inputs, loss=loss_of, **options):
    """The direction that one backward of a captured model adds to its gradients, as one vector."""
    with rgd_ext.precondition(model, **options):
        loss(model(*inputs)).backward()
    return flat_grad(model)


def expected_direction(model, *inputs, policy="Spectral", loss=loss_of):
    """The direction of `model` by the oracle, at the fraction of 0.5 that captures have by default."""
    return weak_field(per_sample_gradients(model, loss, inputs), policy)


def assert_exact(model, *inputs, policy="Spectral", loss=loss_of, **options):
    """In float64 the captured model gets the direction of the oracle; the options are those of the capture."""
    model = model.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = expected_direction(model, *inputs, policy=policy, loss=loss)
    model.zero_grad()
    epsilon = getattr(rgd_ext, policy)(0.5)
    assert_close(captured_grad(model, *inputs, loss=loss, epsilon=epsilon, **options), expected)


def parameter(*shape):
    """A raw parameter in float64."""
    return nn.Parameter(double(*shape) / 2)


def attributes(model):
    """Names of the attributes of each module."""
    return [set(vars(module)) for module in model.modules()]


def double(*shape):
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


class Gain(nn.Module):
    """A module with a raw parameter, which runs as a unit."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.gain


def gain_rule(module, inputs, output_grad):
    """The rule of a `Gain`, which has none unless a test registers it."""
    return {"gain": inputs[0] * output_grad}


def behind(*layers):
    """Layers whose input carries a gradient."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *layers).double()


def own_type(forward, **parts):
    """A `Net` of a type of its own, for `register_rule`."""
    return type("Own", (Net,), {})(forward, **parts)


def as_unit(model):
    """All modules of the type of `model` run as one function from now on."""
    rgd_ext.register_rule(type(model), rgd_ext.unit)


def less_the_mean(m, x):
    """A forward of `two_layers` that mixes the samples."""
    z = m.a(x).tanh()
    return m.b(z - z.mean(0))


def layers(**others):
    """Parts of a `Net`."""
    return {"body": nn.Linear(5, 4), "out": nn.Linear(4, 2), **others}


def raw_parameter():
    """A model that expands a raw parameter to the length of its sequences, which may be the number of samples."""

    def forward(m, x):
        return m.out((m.body(x) + m.p.expand(x.shape[1], -1)).tanh()).mean(1)

    return own_type(forward, **layers(p=nn.Parameter(torch.randn(1, 4))))


def without_small_layers(monkeypatch):
    """No layer is small, so that all are planned."""
    monkeypatch.setattr("rgd_ext.capture.backward.SMALL", 0)


def with_lasting_memory(monkeypatch, nbytes):
    """So many bytes of contributions at most stay from backward to backward."""
    monkeypatch.setattr("rgd_ext.capture.captures.KEPT_BYTES", nbytes)


def guarded(handle):
    """The ids of the parameters whose ordinary gradients the capture keeps away."""
    return set(map(id, handle.context.parameters))


def forget_rule(module_type):
    """Undo `register_rule`."""
    registry._registry.pop(module_type, None)


def register_type(monkeypatch, module_type, layer_type):
    """Enter a type of layers in the registry for one test, with a rule and a spec."""
    monkeypatch.setitem(registry._registry, module_type, layer_type)


def break_proofs(monkeypatch, problem, only_with_hooks):
    """Verifications raise `problem`: all of them, or those that run the hooks of the model."""
    verification = Proof.verification

    def broken(proof):
        if only_with_hooks and proof._runs.leaves_hooks_out:
            return verification(proof)
        raise problem

    monkeypatch.setattr(Proof, "verification", broken)


def skip_without_common_operator():
    """Skip a test of layers that one compiled operator serves together."""
    if _C is None:
        pytest.skip("plain PyTorch forms one layer after another")


def collector(each, together):
    """What collects the uses of small layers, of `each` bytes at most and not more than `together` bytes at a time."""
    skip_without_common_operator()
    return _C.Collector(task=-1, batch_size=B, each=each, all=together, share=3)


def use_of_layer_norm():
    """A use of an nn.LayerNorm of 4 elements in a forward, as a `collector` takes it."""
    layer = nn.LayerNorm(4)
    rule, spec = partial(layer_norm, layer), native_spec(layer_norm_spec(layer))
    return LayerCall(None, NativeContext(None, None), "layer", dict(layer.named_parameters()), B, rule, spec)
