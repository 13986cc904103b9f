"""Every object of the package has few fields, and nobody else writes them."""

import ast
from importlib.util import resolve_name
from typing import NamedTuple

import pytest
from test_layers import modules

MOST_FIELDS = 12
# Fields that others may write, of objects that are not of Python classes of the package.
WRITTEN_BY_OTHERS = {
    "tensors": {"data", "grad", "requires_grad", "origin"},
    "modules": {"_buffers", "forward", "training"},
    "DistributedDataParallel": {"require_backward_grad_sync", "require_forward_param_sync"},
    "functions": {"__kwdefaults__", "__signature__", "argtypes"},
    "torch.nn.utils.parametrize": {"_cache"},
    "generators of NumPy": {"state"},
}
FOREIGN = set().union(*WRITTEN_BY_OTHERS.values())


class Source(NamedTuple):
    """The syntax tree of a module, and the package that its relative imports start from."""

    tree: ast.AST
    package: str


def sources_of(package):
    """The sources of a package by the names of its modules."""
    return {
        name: Source(ast.parse(path.read_text()), name if path.name == "__init__.py" else name.rpartition(".")[0])
        for name, path in modules(package).items()
    }


SOURCES = sources_of("rgd_ext")


def classes(tree):
    """The classes of a module, those inside of functions too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def written(node):
    """The attributes inside of `node` that are assigned or deleted, also by +=, `for` and `with`."""
    return [
        child
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, (ast.Store, ast.Del))
    ]


def is_own(attribute):
    """Whether an object writes the attribute of itself."""
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def own_fields(node):
    """The fields that a class declares in its body or assigns in its methods."""
    declared = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    return declared | {attribute.attr for attribute in written(node) if is_own(attribute)}


def class_named(name, module, sources):
    """The class that `name` stands for in a module, and the module that defines it; None if that is not of ours."""
    if module not in sources:
        return None
    found = [(node, module) for node in classes(sources[module].tree) if node.name == name]
    for node in ast.walk(sources[module].tree):
        if isinstance(node, ast.ImportFrom) and not found:
            origin = resolve_name("." * node.level + (node.module or ""), sources[module].package)
            originals = [alias.name for alias in node.names if name == (alias.asname or alias.name)]
            found = [class_named(original, origin, sources) for original in originals]
    return found[0] if found else None


def fields(node, module, sources):
    """The fields of a class and of its base classes in the package."""
    found = own_fields(node)
    for base in node.bases:
        origin = class_named(ast.unparse(base), module, sources)
        if origin is not None:
            found |= fields(*origin, sources)
    return found


def large_classes(sources):
    """A line for each class with too many fields."""
    found = []
    for module, source in sources.items():
        for node in classes(source.tree):
            names = sorted(fields(node, module, sources))
            if len(names) > MOST_FIELDS:
                found.append(f"{module}.{node.name} has {len(names)} fields: {', '.join(names)}")
    return found


def foreign_writes(name, tree):
    """A line for each assignment to a field of another object."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # A new object is its class's own; the context of an autograd.Function is there to be written.
    born = {each for function in functions if function.name == "__new__" for each in written(function)}
    return [
        f"{name}:{attribute.lineno} writes {ast.unparse(attribute)}"
        for attribute in written(tree)
        if not is_own(attribute)
        and attribute not in born
        and attribute.attr not in FOREIGN
        and ast.unparse(attribute.value) != "ctx"
    ]


def test_no_object_has_many_fields():
    found = large_classes(SOURCES)
    assert not found, "\n".join(found)


def test_nobody_writes_the_fields_of_another_object():
    found = [line for name, source in SOURCES.items() for line in foreign_writes(name, source.tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("owner", WRITTEN_BY_OTHERS)
def test_every_exception_is_needed(owner):
    used = {field.attr for source in SOURCES.values() for field in written(source.tree) if not is_own(field)}
    assert used >= WRITTEN_BY_OTHERS[owner]


@pytest.mark.parametrize(
    "statement",
    [
        "other.x = 1",
        "other.x += 1",
        "other.x: int = 1",
        "other.x, y = 1, 2",
        "del other.x",
        "for other.x in y: pass",
        "self.y.x = 1",
        "other[0].x |= 1",
    ],
)
def test_every_way_to_write_a_field_is_seen(statement):
    assert len(foreign_writes("module", ast.parse(f"def f(self, other, y):\n    {statement}"))) == 1


def test_fields_of_base_classes_are_counted():
    base = "class Base:\n    def __init__(self):\n" + "".join(f"        self.a{n} = 0\n" for n in range(12))
    derived = "from . import base\nfrom .base import Base as Parent\nclass Derived(Parent):\n    one_more: int = 0\n"
    sources = {"package.base": Source(ast.parse(base), "package"), "package.b": Source(ast.parse(derived), "package")}
    (line,) = large_classes(sources)
    assert line.startswith("package.b.Derived has 13 fields: a0, a1, ")
