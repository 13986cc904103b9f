"""docs/architecture.md: the layers are those of the package, and the route of a gradient is what the code does."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from test_layers import HEIGHTS
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import rgd_ext
from rgd_ext.distributed.buckets import LARGE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def file_of(path):
    return ROOT / path if path.startswith("csrc/") else ROOT / "rgd_ext" / path


def roads():
    """The names and files of each part of the diagram, by its heading."""
    (diagram,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    found = {}
    for line in diagram.splitlines():
        step = re.match(r"[ │├└]*([\w.:]+) .* (\S+/\S+\.\w+)$", line)
        if step is None:
            found[line] = steps = []
        else:
            steps.append(step.groups())
    return found


ROADS = roads()
STEPS = [step for steps in ROADS.values() for step in steps]


def definitions(path):
    """The first lines of what a Python file defines, by name."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                first = child.decorator_list[0] if child.decorator_list else child
                found[prefix + child.name] = first.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text()), "")
    return found


def is_defined(name, path):
    if path.suffix == ".py":
        return name in definitions(path)
    text = path.read_text()
    owner, _, function = name.rpartition("::")
    if owner and f"{owner}::{function}(" in text:
        return True
    return all(re.search(rf"(?:struct|class) {word}\b|\b{word}\(", text) for word in name.split("::"))


@pytest.mark.parametrize(("name", "path"), sorted(set(STEPS)))
def test_what_the_diagram_names_is_in_its_file(name, path):
    assert is_defined(name, file_of(path))


def test_every_line_of_the_diagram_but_the_headings_has_a_name_and_a_file():
    assert all(re.match(r"(\([a-z]\) )?[A-Z]{3}", heading) for heading in ROADS)


def test_the_types_that_the_page_names_are_defined():
    python = {name for path in (ROOT / "rgd_ext").rglob("*.py") for name in definitions(path)}
    compiled = {name for path in (ROOT / "csrc").rglob("*.h") for name in re.findall(r"struct (\w+)", path.read_text())}
    assert set(re.findall(r"`([A-Z][a-z]\w+)`", PAGE)) <= python | compiled


def test_the_page_has_all_layers_in_their_order():
    section = PAGE[PAGE.index("## The layers") : PAGE.index("## Five types")]
    parts = re.findall(r"`rgd_ext/(\w+)", section)
    names = ["rgd_ext" if part == "__init__" else part for part in parts]
    assert set(names) == HEIGHTS.keys()
    assert [HEIGHTS[name] for name in names] == sorted(HEIGHTS[name] for name in names)


class WithOwnParameter(nn.Sequential):
    """Parts, and a factor for what they give."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.factor = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return super().forward(x) * self.factor


def parts():
    """A layer that is too large to wait for the end of the backward, and one of vectors."""
    return nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)


FUNCTIONS = {
    (str(file_of(path)), line): (name, path)
    for path in {path for _, path in STEPS if path.endswith(".py")}
    for name, line in definitions(file_of(path)).items()
}


def steps_of(action):
    """The functions in files of the diagram that an action calls, in the order of their first calls."""
    called = {}

    def notice(frame, event, argument):
        step = FUNCTIONS.get((frame.f_code.co_filename, frame.f_code.co_firstlineno))
        if event == "call" and step is not None:
            called.setdefault(step)

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        action()
    finally:
        sys.setprofile(before)
    return list(called)


def step(handle, x):
    handle.model(x).sum().backward()


def accumulated_step(handle, x):
    with handle.accumulate():
        step(handle, x)


def weighted_step(handle, x):
    handle.remove()
    vectors = [torch.ones_like(p) for p in handle.model.parameters()]
    with rgd_ext.precondition(handle.model, weights=lambda stats: stats.align(vectors), verify=False) as weighted:
        step(weighted, x)


def observed_step(handle, x):
    handle.remove()
    with rgd_ext.observe(handle.model, per_parameter=True, verify=False) as observed:
        step(observed, x)


def fit(handle, x):
    net, points = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 1)), torch.randn(4, 2)

    def residuals():
        inputs = points.clone().requires_grad_()
        return torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)[0].sum(1)

    rgd_ext.GaussNewton(net).step(residuals)


def distributed_step(handle, x, shard=lambda net: net):
    handle.remove()
    net = nn.Sequential(*handle.model, nn.Linear(5, LARGE // 5 + 1))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        shard(net)
        with rgd_ext.precondition(net, process_group=distributed.group.WORLD, verify=False) as captured:
            step(captured, x)
    finally:
        distributed.destroy_process_group()


def sharded_step(handle, x):
    distributed_step(handle, x, fully_shard)


# What takes the road with that heading.
ACTIONS = {
    "FORWARD": (lambda: nn.Sequential(*parts()), step),
    "(a) VERIFICATION": (lambda: nn.Sequential(*parts()), lambda handle, x: rgd_ext.verify(handle.model, x)),
    "(b) VALUES": (lambda: WithOwnParameter(*parts()), step),
    "(b) UNITS": (lambda: nn.Sequential(nn.PReLU(), *parts()), step),
    "(c) ACCUMULATE": (lambda: nn.Sequential(*parts()), accumulated_step),
    "(c) PLAN": (lambda: nn.Sequential(*parts()), lambda handle, x: handle.plan(x)),
    "(d) WEIGHTS": (lambda: nn.Sequential(*parts()), weighted_step),
    "(e) PER PARAMETER": (lambda: nn.Sequential(*parts()), observed_step),
    "(f) RESIDUALS": (lambda: nn.Sequential(*parts()), fit),
    "(g) SEVERAL": (lambda: nn.Sequential(*parts()), distributed_step),
    "(h) SHARDED": (lambda: nn.Sequential(*parts()), sharded_step),
}
# The first three parts are one road.
FORWARD, BACKWARD, END, *SIDE_ROADS = ROADS
ROUTES = {FORWARD: ROADS[FORWARD] + ROADS[BACKWARD] + ROADS[END]} | {heading: ROADS[heading] for heading in SIDE_ROADS}


@pytest.mark.parametrize("heading", ROUTES)
def test_the_code_takes_the_route_of_the_diagram(heading):
    build, action = next(case for start, case in ACTIONS.items() if heading.startswith(start))
    x = torch.randn(4, 3, 64, 64)
    with rgd_ext.precondition(build()) as handle:
        handle.model(x)  # which is verified
        called = steps_of(lambda: action(handle, x))
    route = [step for step in ROUTES[heading] if step[1].endswith(".py")]
    assert [step for step in called if step in route] == route
