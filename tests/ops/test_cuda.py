"""What the operators promise on a GPU beyond their numbers: streams, graphs, devices, sizes, bits."""

import warnings

import pytest
import torch
from bad_calls import RAW_BAD, move_examples
from capturing import loss_of
from models import GPT
from operator_cases import CALLS, DTYPES, leaves, sample_grads, vectors_for, weights_for
from oracle import TOLERANCE, assert_close

import rgd_ext
from rgd_ext import ops
from rgd_ext.ops import DEFAULTS

pytestmark = pytest.mark.gpu


def test_the_cuda_kernels_are_compiled():
    assert rgd_ext.build_info()["cuda"] is not None


@pytest.fixture(autouse=True)
def _synchronise_silently():
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first call says that it is a prototype
        torch.cuda.set_sync_debug_mode("default")


def device_calls(grads):
    """CALLS with arguments that are on the device before the call."""
    weights, vectors = weights_for(grads), vectors_for(grads, 3)
    epsilon = torch.full((), 0.1, device=grads[0].device)
    keys = torch.arange(len(weights)).to(weights.device)
    keys = 2 * keys + keys % 2  # of a table of two rows, of which samples use one
    return {
        "embedding_gram": lambda g: torch.ops.rgd_ext.embedding_gram(keys, g[0].flatten(1), 2, len(keys)),
        "ghost_gram": lambda g: ops.ghost_gram(
            [x.flatten(1) for x in g], [x.flatten(1) for x in reversed(g)], [True] * len(g)
        ),
        "group_norm_grads": lambda g: ops.group_norm_grads(g[0].flatten(1), g[0].flatten(1), 1, 1e-5),
        "layer_norm_grads": lambda g: ops.layer_norm_grads(g[0].flatten(1), g[0].flatten(1), 1e-5),
        "gram_moments": lambda g: ops.gram_moments(ops.gram(g)),
        "sample_weights": lambda g: ops.sample_weights(*ops.gram_moments(ops.gram(g))[:3], epsilon.double(), 1e-7),
        "moments": lambda g: ops.moments(g),
        "scalar_moments": lambda g: ops.scalar_moments(g),
        "squared_norm": lambda g: torch.ops.rgd_ext.squared_norm(g),
        "combine": lambda g: ops.combine(g, weights),
        "diffusion_mv": lambda g: ops.diffusion_mv(g, [v[0] for v in vectors]),
        "diffusion_mv of three": lambda g: ops.diffusion_mv(g, vectors),
        "gram": lambda g: ops.gram(g),
        "largest_eigenvalue": lambda g: ops.largest_eigenvalue(ops.gram(g)),
        "precondition": lambda g: ops.precondition(g, epsilon),
    }


DEVICE_CALLS = list(device_calls(sample_grads("flat", torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_run_to_run(name, dtype):
    grads = sample_grads("wide, many samples", dtype, "cuda")
    first = leaves(CALLS[name](grads))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, leaves(CALLS[name](grads)), strict=True))


@pytest.mark.parametrize("name", DEVICE_CALLS)
def test_works_on_the_current_stream(name):
    grads = sample_grads("many", torch.float32, "cuda")
    call = device_calls(grads)[name]
    wanted = leaves(call(grads))
    held = [torch.zeros_like(g) for g in grads]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the zeros
        torch._foreach_copy_(held, grads)
        results = leaves(call(held))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def captured(call):
    """A CUDA graph of `call()`, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("shapes", ["many", "hundred tensors"])
@pytest.mark.parametrize("name", DEVICE_CALLS)
def test_graph_replays_with_new_values(name, shapes):
    grads = sample_grads(shapes, torch.float32, "cuda")
    call = device_calls(grads)[name]
    graph, results = captured(lambda: call(grads))
    for scale in (2.0, -0.5):
        torch._foreach_mul_(grads, scale)
        graph.replay()
        for result, want in zip(leaves(results), leaves(call(grads)), strict=True):
            assert torch.equal(result, want)


POLICIES = [rgd_ext.Fixed(0.1), rgd_ext.Spectral(0.5), rgd_ext.Trace(0.5), rgd_ext.Rayleigh(0.5)]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_direction_never_waits_for_the_device_and_fits_a_graph(policy):
    grads = sample_grads("many", torch.float32, "cuda")
    rgd_ext.direction(grads, epsilon=policy)
    torch.cuda.set_sync_debug_mode("error")
    step, _ = rgd_ext.direction(grads, epsilon=policy)
    torch.cuda.set_sync_debug_mode("default")
    graph, (replayed, stats) = captured(lambda: rgd_ext.direction(grads, epsilon=policy))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(step, replayed, strict=True))
    assert stats.epsilon.isfinite()


def test_a_step_of_a_gpt_gives_the_same_bits_and_fits_a_graph():
    model, x = GPT(vocabulary=200, width=64, length=32).cuda(), torch.randint(200, (8, 32), device="cuda")

    def step():
        model.zero_grad()
        loss_of(model(x)).backward()
        return [p.grad for p in model.parameters()]

    with rgd_ext.precondition(model):
        for _ in range(3):
            first = step()
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
        graph, replayed = captured(step)
        x.random_(200)  # other samples share other rows
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("name", CALLS)
def test_works_on_a_device_that_is_not_current(name):
    grads = sample_grads("many", torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    results = leaves(CALLS[name](grads))
    assert all(r.device == grads[0].device for r in results)
    for result, want in zip(results, leaves(CALLS[name]([g.to("cuda:0") for g in grads])), strict=True):
        assert torch.equal(result.cpu(), want.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1300, 5000])
def test_more_samples_than_fit_on_chip(batch_size, dtype):
    grads = [torch.randn(batch_size, n, device="cuda").add_(0.2).to(dtype) for n in (300, 7)]
    wide = [g.double() for g in grads]
    pairs = zip(leaves(ops.moments(grads)), leaves(DEFAULTS["moments"](wide)), strict=True)
    for result, want in pairs:
        assert torch.allclose(result.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * want.abs().max())
    alignments = ops.moments(grads)[1]
    assert alignments.sum().abs() <= 1e-4 * alignments.abs().sum()
    for result, want in zip(
        ops.precondition(grads, 0.01), DEFAULTS["precondition"](wide, torch.tensor(0.01).cuda()), strict=True
    ):
        assert torch.allclose(result.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * want.abs().max())


def test_more_tensors_than_one_launch_takes():
    grads = [torch.randn(4, 1 + n % 7, device="cuda") for n in range(2000)]
    flat = torch.cat(grads, 1)
    assert_close(torch.cat(ops.precondition(grads, 0.1)), ops.precondition(flat, 0.1)[0])
    assert_close(ops.gram(grads), ops.gram(flat))


def test_more_layers_than_one_launch_takes():
    inputs, output_grads = ([torch.randn(9, 1 + n % k, device="cuda") for n in range(40)] for k in (7, 5))
    grads = [torch.einsum("bm,bn->bmn", e, a).flatten(1) for a, e in zip(inputs, output_grads, strict=True)]
    assert_close(ops.ghost_gram(inputs, output_grads, [True] * 40), ops.gram([*grads, *output_grads]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in DEVICE_CALLS if name != "combine" and "norm" not in name and "embedding" not in name]
)
def test_more_than_two_to_the_31_elements(name):
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    columns = (1 << 31) // 4 + 12_345
    grads = torch.zeros(4, columns, device="cuda", dtype=torch.bfloat16)
    tail = torch.randn(4, 5000, device="cuda").to(torch.bfloat16)
    grads[:, -5000:] = tail  # offsets past 2^31 in the last row
    if name.startswith("diffusion_mv"):
        number = 3 if "three" in name else 1
        vectors = torch.zeros(number, columns, device="cuda", dtype=torch.bfloat16)
        vectors[:, -5000:] = torch.randn(number, 5000, device="cuda").to(torch.bfloat16)
        got, want = ops.diffusion_mv(grads, vectors), ops.diffusion_mv(tail, vectors[:, -5000:])
    else:
        got, want = device_calls([tail])[name]([grads]), device_calls([tail])[name]([tail])
    for result, expected in zip(leaves(got), leaves(want), strict=True):
        assert_close(result[..., -5000:] if result.shape[-1:] == (columns,) else result, expected, torch.bfloat16)


def test_mixed_devices_are_refused():
    cpu, gpu = torch.ones(3, 4), torch.ones(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"devices disagree.*cpu.*cuda"):
        ops.moments([cpu, gpu])
    with pytest.raises(ValueError, match="weights is on cpu"):
        ops.combine(gpu, torch.ones(3))
    for call in (
        lambda: torch.ops.rgd_ext.moments([gpu, cpu]),
        lambda: torch.ops.rgd_ext.combine([gpu], torch.ones(3)),
        lambda: torch.ops.rgd_ext.precondition([gpu], torch.ones(())),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"on (one|their) device"):
            call()


# Of operators with a kernel; weights and other devices are above.
CHECKED = [
    "batch sizes",
    "dtypes",
    "vectors",
    "biases",
    "layers",
    "layer of sequences",
    "rows of a layer",
    "dtype of a layer",
    "not square",
    "gramian not square",
    "statistics of other sizes",
    "epsilon of other dtype",
    "statistics without samples",
    "epsilon for each sample",
    "groups of a norm",
    "shape of a norm",
    "shape of a layer norm",
    "layer norm of numbers",
]


@pytest.mark.parametrize("name", CHECKED)
def test_kernels_check_what_reaches_them(name, monkeypatch):
    move_examples("cuda", monkeypatch)
    with torch.device("cuda"), pytest.raises((RuntimeError, ValueError, TypeError)):
        RAW_BAD[name]()


def test_tf32_is_only_used_where_it_was_allowed():
    grads = torch.randn(64, 20_000, device="cuda")
    want = grads.double() @ grads.double().T
    scale = want.abs().max()
    exact = (ops.gram(grads).double() - want).abs().max() / scale
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = (ops.gram(grads).double() - want).abs().max() / scale
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert exact < 1e-6 < rounded < 1e-3
