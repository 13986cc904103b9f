"""The solver over several batches: when it needs the Gramian, what it remembers, and its rehearsals."""

import pytest
import torch
from metric_cases import rows_of, sample
from oracle import assert_close, direction

from rgd_ext import Fixed, Rayleigh, Spectral, Trace
from rgd_ext.gradients import DenseGradients
from rgd_ext.metric import Solver
from rgd_ext.metric.relativistic import Relativistic


def solver_of(epsilon, inverse="weak-field"):
    return Solver(Relativistic(epsilon, inverse))


def batches(count):
    return [rows_of(sample(scale=1.0 + number)) for number in range(count)]


def solve(solver, rows):
    (step,), stats = solver.solve(DenseGradients(rows), solver.needs_gram)
    return step, stats


@pytest.mark.parametrize(
    ("policy", "weak_field", "exact"),
    [
        (Fixed(0.1), False, True),
        (Spectral(0.5), True, True),
        (Trace(0.5), False, True),
        (Rayleigh(0.5), False, True),
        (0.1, False, True),
        (lambda stats: 0.1, True, True),
    ],
)
def test_needs_the_gramian_for_the_policy_or_the_exact_inverse(policy, weak_field, exact):
    assert solver_of(policy).needs_gram is weak_field
    assert solver_of(policy, "exact").needs_gram is exact


def test_lambda_max_is_computed_in_every_third_batch_and_follows_the_trace_in_between():
    solver, needed = solver_of(Spectral(0.5, every=3)), []
    for number, rows in enumerate(batches(7)):
        needed.append(solver.needs_gram)
        step, stats = solve(solver, rows)
        if number % 3 == 0:
            share = stats.largest_eigenvalue / stats.trace
            assert_close(step, direction(rows, "Spectral", 0.5))
        assert (stats.centred_gram is None) is (number % 3 != 0)
        assert_close(stats.largest_eigenvalue, share * stats.trace)
        assert_close(step, direction(rows, "Fixed", 0.5 / (share * stats.trace)))
    assert needed == [True, False, False, True, False, False, True]


def test_gradients_that_overflow_leave_the_estimate_as_it_was():
    solver = solver_of(Spectral(0.5, every=2))
    rows = batches(1)[0]
    _, first = solve(solver, rows)
    solve(solver, rows)
    solve(solver, rows * float("inf"))
    _, last = solve(solver, rows)
    assert_close(last.largest_eigenvalue, first.largest_eigenvalue)


def test_the_first_estimate_after_equal_gradients_is_the_trace():
    solver = solver_of(Spectral(0.5, every=2))
    solve(solver, torch.ones(6, 3, dtype=torch.float64))
    _, stats = solve(solver, batches(1)[0])
    assert_close(stats.largest_eigenvalue, stats.trace)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_resumed_solver_goes_on_as_the_first_would(before):
    data, policy = batches(before + 4), Spectral(0.5, every=3)
    solver = solver_of(policy)
    for rows in data[:before]:
        solve(solver, rows)
    resumed = solver_of(policy)
    resumed.load_state_dict(solver.state_dict())
    for rows in data[before:]:
        assert resumed.needs_gram is solver.needs_gram
        assert torch.equal(solve(resumed, rows)[0], solve(solver, rows)[0])


def test_an_empty_state_begins_anew_and_other_policies_have_none():
    solver = solver_of(Spectral(0.5, every=3))
    solve(solver, batches(1)[0])
    assert solver.state_dict().keys() == {"largest_eigenvalue"}
    state = solver.state_dict()
    assert not solver.needs_gram
    solver.load_state_dict({})
    assert solver.needs_gram
    other = solver_of(Trace(0.5))
    other.load_state_dict(state)
    assert other.state_dict() == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"more": 1}, "a handle has no state {'more': 1}: .*'preconditioner'"),
        ([], r"a handle has no state \[\]"),
        ({"largest_eigenvalue": None}, r"not a state of Spectral\(every=...\)"),
        ({"largest_eigenvalue": {"batches": -1}}, r"not a state of Spectral\(every=...\)"),
        ({"largest_eigenvalue": {"batches": 1, "share": 0.5}}, r"not a state of Spectral\(every=...\)"),
        ({"largest_eigenvalue": {"batches": 1, "share": torch.ones(2)}}, r"not a state of Spectral\(every=...\)"),
    ],
)
def test_another_state_is_refused_and_nothing_changes(state, message):
    solver = solver_of(Spectral(0.5, every=3))
    solve(solver, batches(1)[0])
    before = solver.state_dict()
    with pytest.raises(ValueError, match=message):
        solver.load_state_dict(state)
    assert solver.state_dict() == before


@pytest.mark.parametrize("inverse", ["weak-field", "exact"])
@pytest.mark.parametrize("needs", ["gram", "norms"])
def test_a_rehearsal_needs_the_same_asks_no_policy_and_leaves_nothing_behind(needs, inverse):
    def policy(stats):
        pytest.fail("was asked")

    policy.needs = needs
    solver = solver_of(policy, inverse)
    rehearsal = solver.rehearsal()
    assert rehearsal.needs_gram is solver.needs_gram
    assert rehearsal.rule.inverse == inverse
    solve(rehearsal, batches(1)[0])


def test_rehearsals_do_not_count_as_batches():
    solver = solver_of(Spectral(0.5, every=2))
    for needed in (True, False, True):
        before = solver.state_dict()
        rehearsal = solver.rehearsal()
        for rows in batches(2):
            assert rehearsal.needs_gram is needed
            solve(rehearsal, rows)
        assert solver.state_dict() == before
        solve(solver, batches(1)[0])
