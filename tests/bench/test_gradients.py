"""The per-sample gradients that `python -m bench kernels` measures on."""

import math

import torch

from bench.gradients.cases import ALIGNMENT, Case, fill, gpt2_small_shapes, resnet50_shapes


def test_parameter_lists_are_those_of_the_networks():
    for shapes, tensors, weights in (
        (resnet50_shapes(), 161, 25_557_032),
        (gpt2_small_shapes(), 148, 124_439_808),
    ):
        assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, weights)


def test_tensors_and_one_tensor_lie_in_the_same_memory():
    case = Case("odd", 3, [5, 1, 400], torch.bfloat16)
    buffer = fill(case, "cpu")
    assert [tuple(t.shape) for t in buffer.tensors] == [(3, 5), (3, 1), (3, 400)]
    assert [tuple(t.shape) for t in buffer.flat] == [(3, 406)]
    assert all(t.is_contiguous() for t in buffer.tensors + buffer.flat)
    assert all((t.data_ptr() - buffer.tensors[0].data_ptr()) % ALIGNMENT == 0 for t in buffer.tensors)
    buffer.flat[0].zero_()
    assert not buffer.tensors[0].any()
