"""Arguments that do not fit are refused, by the public functions, the compiled kernels and the default ones."""

import pytest
import torch
from bad_calls import BAD, RAW_BAD, E, X, move_examples
from operator_cases import DEVICES

import rgd_ext
from rgd_ext.ops import DEFAULTS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, device, monkeypatch):
    move_examples(device, monkeypatch)
    call, error, match = BAD[name]
    with torch.device(device), pytest.raises(error, match=match.replace("cpu", device)):
        call()


@pytest.mark.parametrize("name", RAW_BAD)
def test_compiled_kernels_check_what_reaches_them(name):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("there are no compiled kernels")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        RAW_BAD[name]()


def test_default_kernels_refuse_kinds_and_places_that_do_not_exist():
    with pytest.raises(ValueError, match="kind is dense"):
        DEFAULTS["layer_grads"](["dense"], [X], [X], [1], [0.0], [True])
    with pytest.raises(ValueError, match="more places than a convolution"):
        DEFAULTS["conv_gram"](E, X, [4], [1], [0], [1])
