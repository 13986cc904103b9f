"""What the packages offer beside the table of experiments, by their own documentation."""

from __future__ import annotations

# fastDP was in no package index on this day, so that this benchmark cannot install it; its column is by this commit.
FASTDP, COMMIT, DATE = "fastDP", "16e9f92d7dbc", "2026-11-30"
COLUMNS = ("rgd_ext", "Opacus", "torch.func", "BackPACK", "TorchJD", "curvlinops", FASTDP)

NO = "-"
# By feature, the cells in the order of COLUMNS.
ROWS: dict[str, tuple[str, ...]] = {
    "made for": (
        "training along combinations of gradients",
        "differentially private training",
        "function transforms",
        "quantities beside the gradient",
        "several objectives",
        "curvature matrices",
        "differentially private training",
    ),
    "gradients of samples, as tensors": (NO, "`grad_sample`", "vmap(grad)", "`BatchGrad`", "autojac", NO, NO),
    "their norms, without the tensors": (
        "`Stats`, `observe`",
        '`grad_sample_mode="ghost"`',
        NO,
        "`BatchL2Grad`",
        "diagonal of the Gramian",
        NO,
        "ghost norms",
    ),
    "their Gramian": ("`Stats.gram`", NO, NO, NO, "autogram", NO, NO),
    "left in `.grad`": (
        "the direction",
        "the gradient; `DPOptimizer` replaces it",
        NO,
        "the gradient",
        "the combination",
        NO,
        "sum of clipped gradients",
    ),
    "any optimizer of torch": ("yes", "wrapped by `DPOptimizer`", NO, "yes", "yes", NO, "attached"),
    "clipping by sample": (
        "`weights.Clip`, `weights.Normalise`",
        "flat, per layer, adaptive",
        NO,
        NO,
        NO,
        NO,
        "flat, per layer, per parameter",
    ),
    "privacy: noise, Poisson sampling": (NO, "yes", NO, NO, NO, NO, "noise"),
    "privacy accounting": (NO, "RDP, GDP, PRV", NO, NO, NO, NO, "RDP, GLW"),
    "rules for conflicting gradients": (
        "those of TorchJD, by `weights.FromGramian`",
        NO,
        NO,
        NO,
        "UPGrad, MGDA, PCGrad and others",
        NO,
        NO,
    ),
    "objectives other than samples": (NO, NO, "yes", NO, "yes", NO, NO),
    "Hessian and Gauss-Newton": (
        "`GaussNewton` of residuals",
        NO,
        "`hessian`, `jvp`, `vjp`",
        "`DiagHessian`, `DiagGGNExact`, `HMP`, `GGNMP`",
        NO,
        "products with both",
        NO,
    ),
    "Kronecker factors": (NO, NO, NO, "`KFAC`, `KFLR`, `KFRA`", NO, "KFAC, EKFAC", NO),
    "spectra": ("of D", NO, NO, NO, NO, "densities, traces, diagonals, norms", NO),
    "several processes": ("`process_group`, `fully_shard`", "DDP, FSDP", NO, NO, NO, NO, "DeepSpeed, FSDP"),
    "GPUs": ("no kernel has run on one yet", "yes", "yes", "yes", "yes", "yes", "yes"),
}


def rows() -> list[list[str]]:
    """The table."""
    return [[feature, *cells] for feature, cells in ROWS.items()]
