"""All methods by name."""

from __future__ import annotations

from rgd_ext import Ascent, Rayleigh, Spectral, Trace

from .criteria import class_weights, focal, label_smoothing, reweighted, truncated
from .method import Method
from .optimizers import adamw, clipped, rgd, sam, sgd, upgrad

# Fractions of 1 / lambda_max(D), 1 / tr D and |g|^2 / g^T D g.
FRACTIONS = {Spectral: (0.5, 0.9, -0.5, -0.9), Trace: (0.5, -0.5), Rayleigh: (0.5, -0.5)}
EXACT = (1, 4, 16, 64)  # the same of 1 / lambda_max(D), for the exact inverse
ASCENTS = (0.1, 0.3)  # distances in units of the parameters
RADII = (0.05, 0.1, 0.3)  # those of SAM
DROPPED = (0.2, 0.4)  # shares of a batch
TEMPERATURES = (1, 3)

METHODS: dict[str, Method] = {
    "SGD": Method(sgd),
    "AdamW": Method(adamw),
    **{
        f"{policy.__name__}({fraction})": Method(rgd(policy(fraction)))
        for policy, fractions in FRACTIONS.items()
        for fraction in fractions
    },
    **{f"exact Spectral({fraction})": Method(rgd(Spectral(fraction), "exact")) for fraction in EXACT},
    **{f"Ascent({rho})": Method(rgd(Ascent(rho))) for rho in ASCENTS},
    **{f"SAM({rho})": Method(sam(rho), gradients=2) for rho in RADII},
    "clipping (median)": Method(clipped),
    "UPGrad": Method(upgrad),
    **{f"truncation({share})": Method(sgd, truncated(share)) for share in DROPPED},
    "label smoothing(0.1)": Method(sgd, label_smoothing(0.1)),
    **{f"re-weighting({tau})": Method(sgd, reweighted(tau)) for tau in TEMPERATURES},
    "class weights": Method(sgd, class_weights),
    "focal loss(2)": Method(sgd, focal(2)),
}
