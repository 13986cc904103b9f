"""The page and the command of the comparison with other packages."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare
from bench.comparing import cost, documented
from bench.comparing.attempts import EXACT, REFUSED, WRONG, Attempt
from bench.comparing.cases import CASES
from bench.comparing.cells import LONGEST, Footnotes, cell, code
from bench.comparing.packages import PACKAGES
from bench.comparing.packages.found import Found
from bench.comparing.report import page, versions

RECORD, STEPS = (json.loads((compare.RESULTS / name).read_text()) for name in (compare.FEATURES, compare.COST))
ROOT = Path(__file__).parents[2]


def test_page_of_the_documentation_agrees_with_the_records():
    assert (compare.DOCUMENTATION / "comparison.md").read_text() == compare.page()


def test_record_has_every_case_and_every_way_that_was_needed():
    assert [result["case"] for result in RECORD["cases"]] == list(CASES)
    assert RECORD["failures"] == []
    for result in RECORD["cases"]:
        assert list(result["attempts"]) == list(PACKAGES)
        for package, attempts in result["attempts"].items():
            ways = list(PACKAGES[package].ways)
            assert list(attempts) == ways[: len(attempts)], (result["case"], package)
            last = attempts[ways[len(attempts) - 1]]
            assert last["outcome"] == EXACT or len(attempts) == len(ways)


def test_versions_of_the_record_are_those_of_the_requirements():
    pinned = dict(re.findall(r"^([\w-]+)\S*==(\S+)$", (ROOT / "bench/requirements.txt").read_text(), re.MULTILINE))
    measured = RECORD["environment"]["packages"]
    compared = {package.distribution for package in PACKAGES.values()} - {"rgd_ext", "torch"} | {"transformers"}
    assert {name: measured[name] for name in compared} == {name: pinned[name] for name in compared}
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("torchjd", "transformers"):
        assert re.search(rf'"{name}==([\d.]+)', project)[1] == pinned[name]


def test_cells_name_the_better_option_and_share_footnotes():
    notes = Footnotes()
    refused = Attempt(REFUSED, about="ValueError: a `batch`")
    assert cell({"": Attempt(EXACT, 1e-16)}, "exact", notes) == "exact"
    assert cell({"": Attempt(EXACT, 1e-3)}, "within 0.03", notes) == "within 0.03"
    assert cell({"": refused, "other": Attempt(EXACT, 0.0)}, "exact", notes) == "refused, exact by option[^1]"
    assert cell({"": refused}, "exact", notes) == "refused[^2]"
    assert cell({"": refused}, "exact", notes) == "refused[^2]"
    assert cell({"": Attempt(WRONG, 0.123), "other": refused}, "exact", notes) == "wrong: 0.12[^3]"
    replaced = Attempt(EXACT, 0.0, another_model=True)
    assert cell({"": refused, "other": replaced}, "exact", notes) == "refused, of another model by option[^4]"
    exact = Attempt(EXACT, 0.0)
    assert cell({"": refused, "new": replaced, "same": exact}, "exact", notes) == "refused, exact by option[^5]"
    lines = notes.markdown().splitlines()
    assert lines[0] == "[^1]: refused, `ValueError: a 'batch'`; by other: exact"
    assert lines[2] == "[^3]: wrong: 0.12; no better by other"


def test_messages_that_were_cut_off_end_with_a_whole_word():
    whole = ("word " * LONGEST)[: LONGEST - 2]
    assert code(f"ValueError: {whole}cu").endswith("word …`")
    assert code("ValueError: all of it") == "`ValueError: all of it`"


def test_cost_is_divided_by_that_of_sgd():
    arms = {"SGD": [1.0, 2.0], "RGD Spectral": [1.5, 3.0], "Opacus, Rayleigh": [10.0]}
    peaks = {"SGD": 100, "RGD Spectral": 110, "Opacus, Rayleigh": 1720}
    model = {"milliseconds": arms, "peak_bytes": peaks, "left_out": {"BackPACK, Rayleigh": "ValueError: no"}}
    notes = Footnotes()
    assert cost.cell(model, "RGD Spectral", notes) == "1.50 / 1.10"
    assert cost.cell(model, "Opacus, Rayleigh", notes) == "10 / 17"
    assert cost.cell(model, "BackPACK, Rayleigh", notes) == "refused[^1]"
    assert cost.cell(model, "TorchJD, Spectral", notes) == "-"


def test_documented_rows_have_a_cell_for_every_package():
    assert set(documented.COLUMNS) == {*PACKAGES, documented.FASTDP}
    assert {len(cells) for cells in documented.ROWS.values()} == {len(documented.COLUMNS)}


def test_a_record_without_a_package_makes_no_page():
    environment = RECORD["environment"] | {"packages": {"rgd_ext": "1"}}
    with pytest.raises(ValueError, match="the record was made without opacus, backpack-for-pytorch"):
        versions(environment)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `python -m bench compare` with all paths in a folder."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "DOCUMENTATION", tmp_path)
    return compare.run


def test_single_cases_are_printed_and_nothing_is_written(run, tmp_path, capsys):
    assert run(["MLP"], False) == []
    assert "MLP" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_before_anything_runs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "version", lambda name: None if name == "opacus" else "1")
    (failure,) = run(None, False)
    assert failure == "opacus: not installed; pip install -r bench/requirements.txt"
    assert not list(tmp_path.iterdir())


def test_ours_that_is_wrong_is_a_failure(run, monkeypatch):
    def wrong(problem):
        return Found({"gradients": 2 * problem.rows()}, problem.model)

    monkeypatch.setitem(PACKAGES, "rgd_ext", replace(PACKAGES["rgd_ext"], ways={"": wrong}))
    assert run(["MLP"], False) == ["MLP: rgd_ext is wrong"]


def test_report_is_written_from_the_records(run, tmp_path):
    for name, record in {compare.FEATURES: RECORD, compare.COST: STEPS}.items():
        (tmp_path / name).write_text(json.dumps(record))
    assert run(None, True) == []
    assert (tmp_path / "comparison.md").read_text() == compare.page()


def without_the_last(record, key):
    return record | {key: record[key][:-1]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (compare.FEATURES, None, "holds no record (.*No such file.*)"),
        (compare.FEATURES, "", "holds no record (.*)"),
        (compare.COST, "{}", "lacks 'models'"),
        (compare.COST, json.dumps(STEPS | {"environment": {}}), "lacks 'packages'"),
        (compare.FEATURES, json.dumps(without_the_last(RECORD, "cases")), "lacks 'type and `state_dict` of the model"),
        (compare.COST, json.dumps(without_the_last(STEPS, "models")), "lacks 'GPT 4 x 256"),
    ],
    ids=["missing", "empty", "without models", "without packages", "without a case", "without a model"],
)
def test_a_record_that_is_not_whole_is_named_and_makes_no_page(run, tmp_path, name, text, message):
    for each, record in {compare.FEATURES: RECORD, compare.COST: STEPS}.items():
        (tmp_path / each).write_text(json.dumps(record))
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=rf"{tmp_path / name} {message}.*: run `python -m bench compare`$"):
        run(None, True)
    assert not (tmp_path / "comparison.md").exists()


def test_each_record_is_named_with_its_own_day_and_commit():
    records = [
        record | {"environment": record["environment"] | {"date": f"{name} day", "commit": f"{name} commit"}}
        for name, record in {"cases": RECORD, "steps": STEPS}.items()
    ]
    text = "${date}, ${commit}; ${cost.date}, ${cost.commit}"
    assert page(*records, text) == "cases day, cases commit; steps day, steps commit"


def test_steps_are_timed_after_the_cases_and_a_failure_writes_no_page(run, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(compare.steps, "run", lambda *arguments: called.append(arguments) or ["no time"])
    monkeypatch.setattr(compare, "attempt", lambda only: called.append("cases") or [])
    assert run(None, False) == ["no time"]
    assert called == ["cases", ("cpu", False, str(tmp_path / compare.COST), compare.SMALL)]
    assert not (tmp_path / "comparison.md").exists()


def test_steps_that_were_timed_with_other_packages_make_no_page():
    environment = STEPS["environment"]
    other = STEPS | {"environment": environment | {"packages": environment["packages"] | {"opacus": "0.1"}}}
    with pytest.raises(ValueError, match=r"'Opacus': '0\.1'.*run both anew"):
        page(RECORD, other, "")
