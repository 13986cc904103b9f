"""Arguments and models that cannot be captured are refused by name."""

import pytest
from models import mlp
from torch import nn

import rgd_ext

BAD_CALLS = {
    "not a module": (lambda: rgd_ext.precondition([1]), TypeError, "list"),
    "no trainable parameters": (lambda: rgd_ext.precondition(mlp().requires_grad_(False)), ValueError, "no trainable"),
    "no parameters": (lambda: rgd_ext.precondition(nn.ReLU()), ValueError, "no trainable"),
    "lazy": (lambda: rgd_ext.precondition(nn.LazyLinear(3)), ValueError, "not initialised"),
    "batch_norm": (lambda: rgd_ext.precondition(mlp(), batch_norm="x"), ValueError, "'x'"),
    "inverse": (lambda: rgd_ext.precondition(mlp(), inverse="approximate"), ValueError, "'approximate'"),
    "epsilon": (lambda: rgd_ext.precondition(mlp(), epsilon="0.5"), TypeError, "'0.5'"),
    "epsilon nan": (lambda: rgd_ext.precondition(mlp(), epsilon=float("nan")), ValueError, "nan"),
    "epsilon class": (lambda: rgd_ext.precondition(mlp(), epsilon=rgd_ext.Rayleigh), TypeError, r"Spectral\(0\.5\)"),
    "fraction of no number": (lambda: rgd_ext.Spectral("a"), TypeError, "'a'"),
    "direction of nothing": (lambda: rgd_ext.direction(None), TypeError, "None"),
    "fraction": (lambda: rgd_ext.precondition(mlp(), epsilon=rgd_ext.Spectral(1.0)), ValueError, "fraction=1.0"),
    "batch_dim": (lambda: rgd_ext.precondition(mlp(), batch_dim="time"), TypeError, "'time'"),
    "negative batch_dim": (lambda: rgd_ext.precondition(mlp(), batch_dim=-1), ValueError, "-1"),
    "mark": (lambda: rgd_ext.mark(mlp(), "first"), TypeError, "'first'"),
    "mark module": (lambda: rgd_ext.mark(3, None), TypeError, "int"),
    "rule type": (lambda: rgd_ext.register_rule(mlp(), lambda *_: {}), TypeError, "Sequential"),
    "rule": (lambda: rgd_ext.register_rule(nn.Linear, None), TypeError, "None"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_refused_by_their_value(name):
    call, error, match = BAD_CALLS[name]
    with pytest.raises(error, match=match):
        call()


def test_second_capture_is_refused():
    model = nn.Sequential(mlp(), nn.Linear(3, 3))
    with rgd_ext.precondition(model[0]), pytest.raises(ValueError, match=r"captured already.*handle_of.*remove"):
        rgd_ext.precondition(model)
    rgd_ext.precondition(model).remove()


def old_weight_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize("build", [old_weight_norm, lambda: nn.utils.spectral_norm(nn.Linear(4, 4))])
def test_weights_computed_in_hooks_are_refused(build):
    with pytest.raises(ValueError, match=r"computes its 'weight' in a hook.*parametrizations"):
        rgd_ext.precondition(nn.Sequential(build()))
