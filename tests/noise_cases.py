"""A quick plan of the question about noise scales, and lines of its runs with known ones."""

from bench.studying.data import Sources
from bench.studying.question import Finished, Line, Scope
from bench.studying.questions.noise import QUESTION

QUICK = QUESTION.plan(Finished(), Scope(quick=True, data=("digits",)))
SOURCES = Sources()  # the trunks are kept for this object
SCALES = {"trace": 30.0, "squared_norm": 0.5, "hessian_trace": 8.0, "curvature": 0.2, "loss": 1.0}


def line(part, seed, outcome, **config):
    trunk = {"data": "digits", "model": "MLP", "labels": "clean", "step": 200, "seed": seed}
    return Line(trunk | config | {"part": part}, outcome, 0.0, {})
