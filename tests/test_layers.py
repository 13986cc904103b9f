"""The imports of the package point one way: from the commands down to linear algebra, without circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest; those of one row know nothing of each other.
LAYERS = [
    ["nests", "bits", "progress", "batch_norm", "linalg"],
    ["convolutions"],
    ["ops"],
    ["_binary"],
    ["gradients"],
    ["metric", "contributions"],
    ["distributed"],
    ["planning"],
    ["layers"],
    ["capture"],
    ["optim", "monitor", "weights", "diffusion", "geometry", "gauss_newton", "integrations"],
    ["rgd_ext"],
    ["commands"],
    ["__main__"],
]
HEIGHTS = {name: height for height, row in enumerate(LAYERS) for name in row}


def modules(package):
    """The files of a package by the names of their modules."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package):
    """For each module of a package the modules of the package that it imports, those under TYPE_CHECKING too."""
    files = modules(package)
    found = {}
    for name, path in files.items():
        own_package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            found[name] |= imported(node, own_package, files)
        found[name].discard(name)
    return found


def imported(node, own_package, files):
    """The modules of `files` that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & files.keys()
    if not isinstance(node, ast.ImportFrom):
        return set()
    parts = own_package.split(".")[: len(own_package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*parts, *([node.module] if node.module else [])])
    submodules = {f"{base}.{alias.name}" for alias in node.names} & files.keys()
    # `from . import name` of a compiled module imports nothing from the package itself.
    takes_names = node.module is not None and len(submodules) < len(node.names) and base in files
    return submodules | ({base} if takes_names else set())


@pytest.mark.parametrize("package", ["rgd_ext", "bench"])
def test_no_modules_import_each_other_in_a_circle(package):
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def unit(module):
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_every_part_of_the_package_has_a_layer():
    assert {unit(module) for module in modules("rgd_ext")} == HEIGHTS.keys()


def test_imports_point_down():
    upwards = [
        f"{module} imports {other}"
        for module, others in imports("rgd_ext").items()
        for other in others
        if unit(other) != unit(module) and HEIGHTS[unit(other)] >= HEIGHTS[unit(module)]
    ]
    assert not upwards
