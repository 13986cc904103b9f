"""nn.EmbeddingBag matches the oracle, and its samples are bags of any length."""

import copy

import pytest
import torch
from capturing import assert_exact, captured_grad, double, expected_direction, loss_of
from models import Net
from oracle import assert_close, flat, per_sample_gradients, weak_field
from torch import nn

import rgd_ext

LENGTHS = torch.tensor([3, 0, 1, 5, 2])


ROWS, WIDTH = 9, 4


def flattened(x, lengths, has_end=False):
    """The first entries of each row of x (B, T), one behind the other, and their offsets."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return x[torch.arange(x.shape[1]) < lengths[:, None]], offsets if has_end else offsets[:-1]


def classifier(**options):
    """The EmbeddingBag with a Linear of a text classifier."""

    def forward(m, text, offsets=None, weights=None):
        return m.head(m.bag(text, offsets, weights).tanh())

    return Net(forward, bag=nn.EmbeddingBag(ROWS, WIDTH, **options), head=nn.Linear(WIDTH, 3)).double()


def expected_of(model, x, lengths, *weights):
    """The direction of flat bags, from samples that are made flat one by one."""
    has_end = any(getattr(m, "include_last_offset", False) for m in model.modules())

    def forward(m, x, lengths, *weights):
        of_entries = [flattened(w, lengths)[0] for w in weights]
        return m.inner(*flattened(x, lengths, has_end), *of_entries)

    return weak_field(per_sample_gradients(Net(forward, inner=model), loss_of, [x, lengths, *weights]))


def bags(dtype=torch.int64):
    return torch.randint(ROWS, (len(LENGTHS), 5), dtype=dtype)


OPTIONS = {
    "sum": {"mode": "sum"},
    "mean": {},
    "max": {"mode": "max"},
    "sum, padded": {"mode": "sum", "padding_idx": 2},
    "mean, padded": {"padding_idx": 0},
    "max, padded": {"mode": "max", "padding_idx": 0},
    "renormalised": {"max_norm": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_of_equal_length_match_the_oracle(options, dtype):
    model, x = classifier(**OPTIONS[options]), bags(dtype)
    x[1] = 0  # nothing but padding
    assert_exact(model, x)


@pytest.mark.parametrize("has_end", [False, True], ids=["starts", "starts and end"])
@pytest.mark.parametrize("build", [classifier, lambda **o: nn.EmbeddingBag(ROWS, WIDTH, **o).double()])
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_with_offsets_are_the_samples(options, build, has_end):
    model, x = build(include_last_offset=has_end, **OPTIONS[options]), bags()
    expected = expected_of(model, x, LENGTHS)
    assert_close(captured_grad(model, *flattened(x, LENGTHS, has_end)), expected)
    verification = rgd_ext.verify(model, *flattened(x, LENGTHS, has_end))
    assert (verification.batch_size, verification.samples, verification.note) == (5, (0, 4), "")


@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
def test_weights_of_entries_match_the_oracle_and_get_their_own_gradient(is_flat):
    model, x = classifier(mode="sum", padding_idx=1), bags()
    w = double(*x.shape)
    if is_flat:
        expected, inputs = expected_of(model, x, LENGTHS, w), flattened(x, LENGTHS)
        w = flattened(w, LENGTHS)[0].requires_grad_()
    else:
        embed = Net(lambda m, x, w: m.inner(x, None, w), inner=model)
        expected, inputs, w = expected_direction(embed, x, w), (x, None), w.requires_grad_()
    (own,) = torch.autograd.grad(loss_of(model(*inputs, w)), w)
    assert_close(captured_grad(model, *inputs, w), expected)
    assert_close(w.grad, own)


def test_ties_of_the_maximum_follow_torch():
    model, x = classifier(mode="max"), bags()
    nn.init.zeros_(model.bag.weight)
    assert_close(captured_grad(model, *flattened(x, LENGTHS)), expected_of(model, x, LENGTHS))


def test_every_bag_may_hold_one_entry_or_none():
    model, x = classifier(), bags()
    for lengths in (torch.ones(5, dtype=torch.int64), torch.tensor([2, 0, 1, 1, 1])):
        assert_close(captured_grad(copy.deepcopy(model), *flattened(x, lengths)), expected_of(model, x, lengths))
        assert rgd_ext.verify(model, *flattened(x, lengths)).samples == (0, 4)
    assert not captured_grad(model, *flattened(x, 0 * lengths))[: ROWS * WIDTH].any()


def test_indices_that_add_up_like_lengths_are_not_taken_for_them():
    """Verification would call the model with no offsets, which crashes torch."""
    model, x, lengths = classifier(mode="sum"), torch.tensor([[3, 3], [0, 1], [2, 3]]), torch.tensor([0, 2, 1])
    expected = expected_of(copy.deepcopy(model), x, lengths)
    text, offsets = flattened(x, lengths)

    def forward(m, offsets, text):
        return m.inner(text, offsets)

    with pytest.warns(UserWarning, match="could not be verified completely"):
        assert_close(captured_grad(Net(forward, inner=model), offsets, text), expected)


@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_one_bag_at_a_time_is_one_sample(mode, is_flat):
    model, x = classifier(mode=mode), bags()
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model, batch_dim=None) as handle, handle.accumulate():
        for each in x:
            arguments = (each, torch.tensor([0])) if is_flat else (each[None],)
            (loss_of(model(*arguments)) / len(x)).backward()
    assert_close(flat(p.grad for p in model.parameters()), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_bags_match_the_oracle():
    model, x = classifier(), bags()
    rows = [row[:length] for row, length in zip(x, LENGTHS.clamp(min=1), strict=True)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert_close(captured_grad(model, nested), expected_of(model, x, LENGTHS.clamp(min=1)))
    assert rgd_ext.verify(model, nested).samples == (0, 4)


def test_bags_that_all_samples_share_match_the_oracle():
    table, starts = flattened(bags(), LENGTHS)
    for parts in ({"t": bags()[:3]}, {"t": table, "starts": starts}, {"t": table[:1], "starts": starts[:1]}):
        model = Net(lambda m, x: m.head(x) @ m.bag(m.t, getattr(m, "starts", None)).T, **parts)
        model.bag, model.head = nn.EmbeddingBag(ROWS, WIDTH), nn.Linear(2, WIDTH)
        x = double(len(table), 2)  # as many as indices, by chance
        assert_close(captured_grad(model.double(), x), expected_direction(model, x))


def test_two_bags_beside_a_first_tensor_of_samples_match_the_oracle():
    def forward(m, x, texts, offsets):
        return m.head(x[:, None]) + m.a(texts[0], offsets[0]) * m.b(texts[1], offsets[1])

    def of_rows(m, x, a, b, n, k):
        return m.inner(x, *zip(flattened(a, n), flattened(b, k), strict=True))

    model = Net(forward, a=nn.EmbeddingBag(ROWS, WIDTH), b=nn.EmbeddingBag(ROWS, WIDTH), head=nn.Linear(1, WIDTH))
    first, second, others, x = bags(), bags(), LENGTHS.clamp(min=1), double(5)

    inputs = [x, first, second, LENGTHS, others]
    expected = weak_field(per_sample_gradients(Net(of_rows, inner=model.double()), loss_of, inputs))
    arguments = x, *zip(flattened(first, LENGTHS), flattened(second, others), strict=True)
    assert_close(captured_grad(model, *arguments), expected)
    assert rgd_ext.verify(model, *arguments).samples == (0, 4)


class Scaled(nn.Module):
    """A text classifier with a parameter of its own around."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.p = inner, nn.Parameter(torch.randn(3))

    def forward(self, text, offsets=None):
        return self.inner(text, offsets) * self.p


def test_mixing_of_bags_is_found():
    model = Net(lambda m, text, offsets: m.head(m.bag(text, offsets).cumsum(0)), **vars(classifier())["_modules"])
    with pytest.raises(ValueError, match="the forward mixes samples"):
        captured_grad(model, *flattened(bags(), LENGTHS))


def test_offsets_made_inside_of_lengths_match_the_oracle():
    model, x = classifier(), bags()
    text, _ = flattened(x, LENGTHS)
    by_length = Net(lambda m, text, n: m.inner(text, n.cumsum(0) - n), inner=model)
    assert_close(captured_grad(by_length, text, LENGTHS), expected_of(model, x, LENGTHS))
    assert rgd_ext.verify(by_length, text, LENGTHS).samples == (0, 4)


def test_indices_made_inside_match_the_oracle():
    model, x = classifier(), bags()
    hashed = Net(lambda m, text, offsets: m.inner(text % 5, offsets), inner=model)
    assert_close(captured_grad(hashed, *flattened(x, LENGTHS)), expected_of(model, x % 5, LENGTHS))


def test_indices_and_offsets_made_inside_need_a_mark():
    model, x = classifier(), bags()
    text, _ = flattened(x, LENGTHS)
    hashed = Net(lambda m, text, n: m.inner(text % 5, n.cumsum(0) - n), inner=model)
    with pytest.raises(ValueError, match=r"'inner\.bag' .* 5 bags of 11 indices.*mark\(module, batch_dim=0\)"):
        captured_grad(hashed, text, LENGTHS)
    rgd_ext.mark(model.bag, batch_dim=0)
    assert_close(captured_grad(hashed, text, LENGTHS), expected_of(model, x % 5, LENGTHS))


def test_parameters_used_before_the_bags_are_counted_are_refused():
    model, x = classifier(padding_idx=8), bags() % 8
    text, offsets = flattened(x, LENGTHS)
    scaled = Scaled(model).double()
    with pytest.raises(ValueError, match=r"5 bags in a batch of 11 samples, after 'Scaled\.p' was used"):
        captured_grad(scaled, text, offsets)
    expected = expected_of(scaled, x, LENGTHS)
    with rgd_ext.precondition(scaled):
        loss_of(scaled(offsets=offsets, text=text)).backward()
    assert_close(flat(p.grad for p in scaled.parameters()), expected)
    scaled.zero_grad()
    assert_close(captured_grad(scaled, x.masked_fill(torch.arange(5) >= LENGTHS[:, None], 8)), expected)


def test_bags_given_for_all_samples_need_a_mark():
    model = Net(lambda m, x, *text: m.head(x) @ m.bag(*text).T, **vars(classifier())["_modules"]).double()
    model.head, x, text = nn.Linear(2, WIDTH).double(), double(6, 2), flattened(bags(), LENGTHS)
    with pytest.raises(ValueError, match=r"5 bags in a batch of 6 samples.*mark\(module, batch_dim=None\)"):
        captured_grad(model, x, *text)
    rgd_ext.mark(model.bag, batch_dim=None)
    with_text = Net(lambda m, x: m.inner(x, *text), inner=model)
    assert_close(captured_grad(model, x, *text), expected_direction(with_text, x))


def test_indices_that_another_layer_took_for_samples_are_refused_and_padded_bags_exact():
    model, x = classifier(mode="sum", padding_idx=0), bags()
    weights = nn.Embedding(ROWS, 1).double()
    weighted = Net(lambda m, x, n=None: m.inner(x, n, m.weights(x)[..., 0]), inner=model, weights=weights)
    with pytest.raises(ValueError, match=r"'weights' ran with 11 samples.*bags \(B, T\), filled up with padding_idx"):
        captured_grad(weighted, *flattened(x, LENGTHS))
    x = x.masked_fill(torch.arange(5) >= LENGTHS[:, None], 0)
    assert_exact(weighted, x)


def test_weights_that_all_samples_share_are_refused_and_expanded_ones_exact():
    model, x = classifier(mode="sum"), bags()
    p = nn.Parameter(double(x.shape[1]))
    whole = Net(lambda m, x: m.inner(x, None, (m.p * torch.ones_like(x[:1])).sin()), inner=model, p=p)
    with pytest.raises(ValueError, match=r"weights that all samples share.*expand\(len\(input\), -1\)"):
        captured_grad(whole, x)
    whole._forward = lambda m, x: m.inner(x, None, m.p.sin().expand(len(x), -1))
    assert_exact(whole, x)


def test_what_does_not_tell_bags_is_refused():
    model = classifier(scale_grad_by_freq=True)
    with pytest.raises(ValueError, match=r"'bag' \(EmbeddingBag\).*couples the samples.*scale_grad_by_freq=False"):
        rgd_ext.precondition(model)
    model = classifier()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
        model(bags().flatten())
    rgd_ext.mark(model.bag, batch_dim=1)
    with pytest.raises(ValueError, match="marked with batch_dim=1"):
        captured_grad(model, bags())
