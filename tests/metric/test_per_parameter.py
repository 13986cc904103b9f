"""The table of the statistics of each parameter, from moments, and its sums by module."""

import numpy as np
import pytest
import torch
from oracle import assert_close

from rgd_ext.metric import PerParameter
from rgd_ext.metric.per_parameter import modules_of

SHAPES = {"body.0.weight": (3, 2), "body.0.bias": (3,), "body.1.gain": (4,), "head.weight": (2, 3), "scale": (1,)}
MODULES = {
    "": [*SHAPES],
    "body": ["body.0.weight", "body.0.bias", "body.1.gain"],
    "body.0": ["body.0.weight", "body.0.bias"],
    "body.1": ["body.1.gain"],
    "head": ["head.weight"],
}


@pytest.fixture
def gradients():
    return {name: torch.randn(6, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def items_of(gradients):
    """|g|^2 and tr D of each part."""
    return {
        name: (rows.mean(0).square().sum(), rows.flatten(1).var(0, correction=0).sum())
        for name, rows in gradients.items()
    }


@pytest.fixture
def table(gradients):
    return PerParameter(6, items_of(gradients))


def expected(*parts):
    """|g|, tr D, and unbiased estimates of tr Sigma and |mu|^2 of parts of the gradients, from the definitions."""
    rows = torch.cat([part.flatten(1) for part in parts], 1)
    squared, covariance = rows.mean(0).square().sum(), rows.var(0, correction=1).sum()
    return squared.sqrt(), rows.var(0, correction=0).sum(), covariance, squared - covariance / len(rows)


def assert_has(table, name, parts):
    grad_norm, trace, covariance, squared = expected(*parts)
    assert_close(torch.stack(table[name]), torch.stack([grad_norm, trace, covariance / squared]))


def test_each_name_has_the_statistics_of_its_part(gradients, table):
    assert [*table] == [*SHAPES]
    assert len(table) == len(SHAPES)
    for name, rows in gradients.items():
        assert_has(table, name, [rows])


def test_modules_have_those_of_all_parameters_in_them(gradients, table):
    modules = table.by_module()
    assert [*modules] == [*MODULES]
    for module, names in MODULES.items():
        assert_has(modules, module, [gradients[name] for name in names])


def test_a_parameter_is_in_its_module_and_those_around_it():
    assert modules_of("blocks.0.attention.weight") == ["", "blocks", "blocks.0", "blocks.0.attention"]
    assert modules_of("weight") == [""]


def test_columns_have_a_value_for_each_name(gradients, table):
    columns = table.to_dict()
    assert columns.pop("name").tolist() == [*SHAPES]
    names = ["grad_norm", "trace", "noise_scale", "unbiased_trace", "unbiased_squared_grad_norm"]
    assert [*columns] == names
    for place, rows in enumerate(gradients.values()):
        grad_norm, trace, covariance, squared = expected(rows)
        values = [grad_norm, trace, covariance / squared, covariance, squared]
        np.testing.assert_allclose([columns[name][place] for name in names], torch.stack(values), rtol=1e-9)


def test_it_prints_a_row_for_each_name(table):
    head, *rows = repr(table).splitlines()
    assert head.split() == ["name", "grad_norm", "trace", "noise_scale"]
    assert [row.split()[0] for row in rows] == [*SHAPES]
    assert [float(cell) for cell in rows[0].split()[1:]] == pytest.approx(
        [*map(float, table["body.0.weight"])], rel=1e-3
    )
    assert repr(table.by_module()).splitlines()[1].split()[0] == "(model)"


def test_an_unknown_name_is_a_key_error(table):
    with pytest.raises(KeyError, match=r"body.2"):
        table["body.2"]


def test_parameters_of_several_dtypes_are_in_one_table(gradients):
    items = items_of(gradients | {"scale": gradients["scale"].float()})
    table = PerParameter(6, items)
    assert_close(table["scale"].trace, expected(gradients["scale"])[1], torch.float32)
    assert_close(table["head.weight"].trace, expected(gradients["head.weight"])[1])
