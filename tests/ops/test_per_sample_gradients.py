"""Operators on per-sample gradients against float64, on every device there is: `CALLS`, and squared norms."""

import pytest
import torch
from operator_cases import (
    CALLS,
    DEVICES,
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same_bits,
    laid_out,
    leaves,
    on_threads,
    opcheck,
    sample_grads,
    vectors_for,
    weights_for,
)
from oracle import TOLERANCE, assert_close, diffusion_matrix, flat

import rgd_ext
from rgd_ext import linalg, ops
from rgd_ext.ops import DEFAULTS


def expected(name, grads):
    grads = [g.double().cpu() for g in grads]
    if name == "scalar_moments":
        mean, *scalars = DEFAULTS["moments"](grads)
        return sum(g.square().sum() for g in mean), *scalars
    function = DEFAULTS[name.split()[0]]
    extra = {
        "moments": [],
        "gram": [],
        "combine": [weights_for(grads).double()],
        "diffusion_mv": [vectors_for(grads, 3 if "three" in name else None)],
        "precondition": [torch.tensor(0.1, dtype=torch.float64)],
    }
    return function(grads, *extra[name.split()[0]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_matches_the_default_kernel_in_float64(name, shapes, dtype, device):
    grads = sample_grads(shapes, dtype, device)
    results, wanted = leaves(CALLS[name](grads)), leaves(expected(name, grads))
    assert [r.shape for r in results] == [w.shape for w in wanted]
    assert all(r.dtype in (dtype, linalg.accumulate_dtype(dtype)) for r in results)
    scale = max(w.abs().max() if w.numel() else 0 for w in wanted)
    for result, want in zip(results, wanted, strict=True):
        assert torch.allclose(result.double().cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_memory_layout_does_not_matter(name, layout, device):
    grads = laid_out(sample_grads("many", torch.float32, device), layout)
    results = leaves(CALLS[name](grads))
    for result, want in zip(results, leaves(CALLS[name]([g.contiguous() for g in grads])), strict=True):
        assert_close(result, want)
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["many", "wide", "wide, many samples", "hundred tensors"])
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name, shapes, dtype):
    if not rgd_ext.build_info()["compiled"]:
        pytest.skip("PyTorch's own reductions depend on the number of threads")
    grads = sample_grads(shapes, dtype)
    assert_same_bits(on_threads((1, 2, 3, 5), lambda: CALLS[name](grads)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("shapes", ["many", "empty parameter"])
@pytest.mark.parametrize("name", ["moments", "scalar_moments", "combine", "diffusion_mv", "gram", "precondition"])
def test_opcheck(name, shapes, layout, dtype, device):
    grads = laid_out(sample_grads(shapes, dtype, device), layout)
    accumulate = linalg.accumulate_dtype(dtype)
    extra = {
        "moments": (),
        "scalar_moments": (),
        "gram": (),
        "combine": (weights_for(grads).to(accumulate),),
        "diffusion_mv": (vectors_for(grads, 2),),
        "precondition": (torch.tensor(0.1, dtype=accumulate, device=device),),
    }
    opcheck(name, (grads, *extra[name]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_breaks(name, device):
    grads = sample_grads("many", torch.float32, device)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for result, want in zip(leaves(compiled(grads)), leaves(CALLS[name](grads)), strict=True):
        assert torch.equal(result, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ["flat", "many", "wide", "wide, many samples"])
def test_epsilon_zero_and_equal_weights_give_the_mean_bitwise(shapes, dtype, device):
    grads = sample_grads(shapes, dtype, device)
    mean, _, _ = ops.moments(grads)
    equal = torch.full((len(grads[0]),), 1 / len(grads[0]), dtype=linalg.accumulate_dtype(dtype), device=device)
    for results in (ops.precondition(grads, 0.0), ops.combine(grads, equal)):
        assert all(torch.equal(a, b) for a, b in zip(results, mean, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_is_a_list_of_one(dtype, device):
    (grads,) = sample_grads("flat", dtype, device)
    for name in ("moments", "gram"):
        for a, b in zip(leaves(getattr(ops, name)(grads)), leaves(getattr(ops, name)([grads])), strict=True):
            assert torch.equal(a, b)
    assert isinstance(ops.precondition(grads, 0.1), list)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_is_exactly_symmetric(device):
    for shapes in SHAPES:
        gram = ops.gram(sample_grads(shapes, torch.float32, device))
        assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_agree_with_the_explicit_diffusion_matrix(device):
    grads = sample_grads("many", torch.float64, device)
    rows = torch.cat([g.flatten(1) for g in grads], 1)
    matrix, mean = diffusion_matrix(rows), rows.mean(0)
    _, alignments, squared_norms = ops.moments(grads)
    assert_close(alignments, (rows - mean) @ mean)
    assert_close(squared_norms.mean(), matrix.trace())
    assert_close(flat(ops.diffusion_mv(grads, vectors_for(grads))), matrix @ flat(vectors_for(grads)))
    assert_close(flat(ops.precondition(grads, 0.3)), mean - 0.3 * matrix @ mean)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_values_that_are_not_finite_flow_through(name, value, device):
    grads = sample_grads("many", torch.float32, device)
    grads[1][2, 3] = value
    assert any(not r.isfinite().all() for r in leaves(CALLS[name](grads)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [[()], [(3,), (2, 5), ()], [(100_003,)]], ids=str)
def test_squared_norm(shapes, dtype, device):
    vector = [torch.randn(shape).to(device, dtype) for shape in shapes]
    vector[-1] = vector[-1].expand(2, *vector[-1].shape).movedim(0, -1)  # not contiguous
    result = torch.ops.rgd_ext.squared_norm(vector)
    assert result.shape == ()
    assert_close(result.cpu(), sum(v.double().cpu().square().sum() for v in vector), dtype)
    opcheck("squared_norm", (vector,))
