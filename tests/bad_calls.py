"""Calls of operators with arguments that do not fit, and the examples of tensors they are made of."""

import torch

from rgd_ext import ops

G, S = torch.ones(3, 4), torch.ones(())


E, X, W = torch.ones(2, 6, 5), torch.ones(2, 4, 7), torch.ones(2, 6, 4, 3)


BAD = {
    "no tensors": (lambda: ops.moments([]), ValueError, "empty"),
    "empty batch": (lambda: ops.gram(torch.ones(0, 4)), ValueError, r"empty batch.*\(0, 4\)"),
    "scalar": (lambda: ops.moments(torch.tensor(1.0)), ValueError, "scalar"),
    "integers": (lambda: ops.moments(torch.ones(3, 4, dtype=torch.int64)), TypeError, "torch.int64"),
    "not a tensor": (lambda: ops.moments([[1.0]]), TypeError, "list"),
    "batch sizes": (lambda: ops.moments([G, G[:2]]), ValueError, "3 samples and grads.1. has 2"),
    "dtypes": (lambda: ops.moments([G, G.double()]), TypeError, r"torch\.float32.*torch\.float64"),
    "devices": (lambda: ops.moments([G, G.to("meta")]), ValueError, "cpu.*meta"),
    "weights": (lambda: ops.combine(G, torch.ones(4)), ValueError, r"\(4,\).*3 samples"),
    "weights on another device": (lambda: ops.combine(G, torch.ones(3, device="meta")), ValueError, "meta.*cpu"),
    "vectors": (lambda: ops.diffusion_mv(G, torch.ones(5)), ValueError, r"\(5,\).*\(4,\)"),
    "number of vectors": (lambda: ops.diffusion_mv(G, [torch.ones(4)] * 2), ValueError, "1 tensors and vectors 2"),
    "dtype of vectors": (lambda: ops.diffusion_mv(G, torch.ones(4).double()), ValueError, "torch.float64"),
    "vectors disagree": (
        lambda: ops.diffusion_mv([G, G], [torch.ones(2, 4), torch.ones(3, 4)]),
        ValueError,
        r"\(2,\), \(3,\)",
    ),
    "layers": (lambda: ops.ghost_gram([G], [G, G], [True]), ValueError, "1 inputs, 2 output gradients and 1 biases"),
    "biases": (lambda: ops.ghost_gram([G], [G], []), ValueError, "0 biases"),
    "weights of layers": (lambda: ops.ghost_combine([G], [G], [True], S), ValueError, r"weights has shape \(\).* 3 "),
    "integer weights": (lambda: ops.ghost_combine([G], [G], [True], G[:, 0].long()), ValueError, "torch.int64"),
    "combined layers": (lambda: ops.ghost_combine([G], [G, G], [True], G[:, 0]), ValueError, "1 inputs, 2 output"),
    "layer of sequences": (lambda: ops.ghost_gram([G[None]], [G[None]], [True]), ValueError, r"\(1, 3, 4\)"),
    "layer of other dtype": (lambda: ops.ghost_gram([G.double()], [G], [True]), TypeError, "disagree"),
    "not square": (lambda: ops.largest_eigenvalue(G), ValueError, r"\(3, 4\)"),
    "gramian not square": (lambda: ops.gram_moments(G), ValueError, r"gram has shape \(3, 4\)"),
    "gramian of halves": (lambda: ops.gram_moments(G[:, :3].half()), TypeError, "float16"),
    "statistics of other sizes": (lambda: ops.sample_weights(S, G[0], G[0, :3], S, 1e-7), ValueError, r"\(3,\)"),
    "epsilon for each sample": (lambda: ops.sample_weights(S, G[0], G[0], G[0], 1e-7), ValueError, "epsilon has shape"),
    "epsilon of other dtype": (lambda: ops.sample_weights(S, G[0], G[0], S.double(), 1e-7), ValueError, "float64"),
    "statistics in half": (lambda: ops.sample_weights(*[t.half() for t in (S, G[0], G[0], S)], 1e-7), TypeError, "16"),
    "empty matrix": (lambda: ops.largest_eigenvalue(G[:0, :0]), ValueError, r"\(0, 0\)"),
    "ulp": (lambda: ops.largest_eigenvalue(torch.eye(2), -1e-7), ValueError, "ulp is -1e-07"),
    "dtype of a matrix": (lambda: ops.largest_eigenvalue(torch.eye(2).half()), TypeError, "torch.float16"),
    "matrices": (lambda: ops.conv_weight_grads(G, G, [], [], [], [], 1), ValueError, r"\(3, 4\).*one to three"),
    "samples": (lambda: ops.conv_weight_grads(E[:1], X, [3], [1], [0], [1], 1), ValueError, "1 samples.* has 2"),
    "kernel": (lambda: ops.conv_weight_grads(E, X, [3, 3], [1], [0], [1], 1), ValueError, r"kernel is \(3, 3\)"),
    "stride": (lambda: ops.conv_weight_grads(E, X, [3], [0], [0], [1], 1), ValueError, r"stride is \(0,\)"),
    "padding": (lambda: ops.conv_weight_grads(E, X, [3], [1], [-1], [1], 1), ValueError, r"padding is \(-1,\)"),
    "groups": (lambda: ops.conv_weight_grads(E, X, [3], [1], [0], [1], 4), ValueError, "groups is 4.*6 and 4"),
    "places": (lambda: ops.conv_weight_grads(E, X, [4], [1], [0], [1], 1), ValueError, "5 places.*at most 4"),
    "groups of a norm": (lambda: ops.group_norm_grads(X, X, 3, 1e-5), ValueError, "groups is 3.*4 channels"),
    "shape of a norm": (lambda: ops.group_norm_grads(E, X, 1, 1e-5), ValueError, r"\(2, 6, 5\).*\(2, 4, 7\)"),
    "shape of a layer norm": (lambda: ops.layer_norm_grads(E, X, 1e-5), ValueError, r"\(2, 6, 5\).*\(2, 4, 7\)"),
    "layer norm of numbers": (lambda: ops.layer_norm_grads(G[0], G[0], 1e-5), ValueError, r"\(4,\).*\(B, ..., n\)"),
    "dtypes of a layer norm": (lambda: ops.layer_norm_grads(X, X.double(), 1e-5), TypeError, "disagree"),
    "epsilon": (lambda: ops.precondition(G, float("nan")), ValueError, "epsilon is nan"),
    "epsilon of two": (lambda: ops.precondition(G, torch.ones(2)), ValueError, r"shape \(2,\)"),
}


RAW_BAD = {
    "no tensors": lambda: torch.ops.rgd_ext.moments([]),
    "empty batch": lambda: torch.ops.rgd_ext.gram([torch.ones(0, 4)]),
    "batch sizes": lambda: torch.ops.rgd_ext.moments([G, G[:2]]),
    "dtypes": lambda: torch.ops.rgd_ext.moments([G, G.double()]),
    "integers": lambda: torch.ops.rgd_ext.moments([torch.ones(3, 4, dtype=torch.int64)]),
    "weights": lambda: torch.ops.rgd_ext.combine([G], torch.ones(2)),
    "vectors": lambda: torch.ops.rgd_ext.diffusion_mv([G], [torch.ones(5)]),
    "epsilon": lambda: torch.ops.rgd_ext.precondition([G], torch.ones(2)),
    "biases": lambda: torch.ops.rgd_ext.ghost_gram([G], [G], []),
    "layers": lambda: torch.ops.rgd_ext.ghost_gram([G], [G, G], [True, True]),
    "weights of layers": lambda: torch.ops.rgd_ext.ghost_combine([G], [G], [True], S),
    "layer of sequences": lambda: torch.ops.rgd_ext.ghost_gram([G[None]], [G[None]], [True]),
    "rows of a layer": lambda: torch.ops.rgd_ext.ghost_gram([G[:2]], [G], [True]),
    "dtype of a layer": lambda: torch.ops.rgd_ext.ghost_gram([G.double()], [G], [True]),
    "not square": lambda: torch.ops.rgd_ext.largest_eigenvalue(G, 1e-7),
    "gramian not square": lambda: torch.ops.rgd_ext.gram_moments(G),
    "statistics of other sizes": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0, :3], S, 1e-7),
    "statistics without samples": lambda: torch.ops.rgd_ext.sample_weights(S, G[0, :0], G[0, :0], S, 1e-7),
    "epsilon for each sample": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0], G[0], 1e-7),
    "epsilon of other dtype": lambda: torch.ops.rgd_ext.sample_weights(S, G[0], G[0], S.double(), 1e-7),
    "dtype of a matrix": lambda: torch.ops.rgd_ext.largest_eigenvalue(torch.eye(2).half(), 1e-7),
    "matrices": lambda: torch.ops.rgd_ext.conv_weight_grads(G, G, [], [], [], [], 1, G),
    "kernel": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3, 3], [1], [0], [1], 1, W),
    "groups": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3], [1], [0], [1], 4, W),
    "places": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [4], [1], [0], [1], 1, W),
    "shape of a result": lambda: torch.ops.rgd_ext.conv_weight_grads(E, X, [3], [1], [0], [1], 1, W[:, :5]),
    "strides of a result": lambda: torch.ops.rgd_ext.conv_weight_grads(
        E, X, [3], [1], [0], [1], 1, W.mT.contiguous().mT
    ),
    "kernel of a Gramian": lambda: torch.ops.rgd_ext.conv_gram(E, X, [3, 3], [1], [0], [1]),
    "places of a Gramian": lambda: torch.ops.rgd_ext.conv_gram(E, X, [4], [1], [0], [1]),
    "no channels": lambda: torch.ops.rgd_ext.conv_gram(E, X[:, :0], [3], [1], [0], [1]),
    "no output channels": lambda: torch.ops.rgd_ext.conv_scalar_moments(E[:, :0], X, [3], [1], [0], [1]),
    "dtypes of moments": lambda: torch.ops.rgd_ext.conv_scalar_moments(E, X.double(), [3], [1], [0], [1]),
    "groups of a norm": lambda: torch.ops.rgd_ext.group_norm_grads(X, X, 3, 1e-5),
    "shape of a norm": lambda: torch.ops.rgd_ext.group_norm_grads(E, X, 1, 1e-5),
    "shape of a layer norm": lambda: torch.ops.rgd_ext.layer_norm_grads(E, X, 1e-5, True),
    "layer norm of numbers": lambda: torch.ops.rgd_ext.layer_norm_grads(G[0], G[0], 1e-5, True),
    "kind of a layer": lambda: torch.ops.rgd_ext.layer_grads(["dense"], [X], [X], [1], [0.0], [True]),
    "kinds of layers": lambda: torch.ops.rgd_ext.layer_grads(["linear"] * 2, [X], [X], [1], [0.0], [True]),
    "no layers": lambda: torch.ops.rgd_ext.layer_grads([], [], [], [], [], []),
    "places of a layer": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [E], [X], [1], [0.0], [True]),
    "vectors of a layer": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [G], [G], [1], [0.0], [True]),
    "groups of a layer": lambda: torch.ops.rgd_ext.layer_grads(["group_norm"], [X], [X], [3], [0.0], [True]),
    "shape of a layer": lambda: torch.ops.rgd_ext.layer_grads(["rms_norm"], [E], [X], [1], [0.0], [True]),
    "batches of layers": lambda: torch.ops.rgd_ext.layer_grads(
        ["layer_norm"] * 2, [G, G[:2]], [G, G[:2]], [1, 1], [0.0, 0.0], [True, True]
    ),
    "dtypes of layers": lambda: torch.ops.rgd_ext.layer_grads(["linear"], [X], [X.double()], [1], [0.0], [True]),
}


def move_examples(device, monkeypatch):
    """What BAD and RAW_BAD are called with, to a device."""
    for name in "GSEXW":
        monkeypatch.setitem(globals(), name, globals()[name].to(device))
