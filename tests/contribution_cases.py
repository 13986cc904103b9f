"""The internals of contributions that tests reach into."""

from functools import partial

import torch

from rgd_ext.capture.native import LayerCall, NativeContext, native_spec
from rgd_ext.capture.recorders.bags import Bags, embedding_bag, entries
from rgd_ext.capture.rule_output import apply_rule
from rgd_ext.contributions import merge
from rgd_ext.contributions.ledger import Contributions
from rgd_ext.layers.embedding import embedding
from rgd_ext.layers.linear import linear
from rgd_ext.layers.spec import LINEAR


def with_blocks(monkeypatch, elements):
    """What is computed in blocks has blocks of so many elements."""
    for module in (
        "convolutions",
        "ops.embedding",
        *(f"contributions.{name}" for name in ("blockwise", "convolution", "outer")),
    ):
        monkeypatch.setattr(f"rgd_ext.{module}.block_elements", lambda device: elements)


def collected(factors):
    """The per-sample gradients of a model with these contributions, one per parameter."""
    parameters = [torch.nn.Parameter(factor.dense()[0].clone()) for factor in factors]
    return Contributions.of(zip(parameters, factors, strict=True), factors[0].batch_size)


def sum_of_uses(factors):
    """The contributions of several uses of one parameter as those of one use."""
    return merge.sum_uses(factors)


def union_of_batches(factors):
    """The contributions of several batches as those of one batch."""
    return merge.concatenate_batches(factors)


def as_one_sample(contributions):
    """The contributions of all samples as those of one."""
    return merge.as_one_sample(contributions)


def with_strategy(factor, strategy):
    """The contributions as they are held under this strategy."""
    return factor.apply(strategy, None)


def of_linear_layer(inputs, output_grad, shape, dtype=torch.float32, is_known=True):
    """What an nn.Linear with parameters of `dtype` contributes; `is_known` if the capture knows its kind."""
    parameters = {"weight": torch.empty(shape, dtype=dtype), "bias": torch.empty(shape[0], dtype=dtype)}
    spec = native_spec(LINEAR if is_known else None)
    call = LayerCall(None, NativeContext(None, None), "layer", parameters, len(inputs), partial(linear, None), spec)
    return apply_rule(call, [inputs], output_grad)


def of_embedding(layer, indices, output_grad):
    """What an nn.Embedding contributes to its table."""
    return embedding(layer, (indices,), output_grad)["weight"]


def of_bags(layer, indices, output_grad):
    """What an nn.EmbeddingBag contributes to its table, for bags (B, T)."""
    return embedding_bag(layer, entries(layer, Bags.from_rows(indices, None)), output_grad)["weight"]
