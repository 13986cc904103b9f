"""The lines of the study on disk."""

import pytest
from squares import MACHINE, line, seeds

from bench.studying.question import Line
from bench.studying.store import Store


def test_lines_are_read_as_they_were_written(tmp_path):
    writer, reader = Store(tmp_path, "squares"), Store(tmp_path, "squares")
    for seed in range(3):
        writer.append(line(seed, curve=[1.0, 2.5], name="a"))
        reader.refresh()
        assert len(reader.finished) == seed + 1
    assert reader.finished[{"seed": 1}] == line(1, curve=[1.0, 2.5], name="a")
    assert {"seed": 2} in reader.finished
    assert {"seed": 3} not in reader.finished


def test_order_of_the_entries_of_a_configuration_does_not_matter(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(Line({"a": 1, "b": 2}, {}, 1.0, MACHINE))
    assert {"b": 2, "a": 1} in store.finished
    assert store.finished.grouped("b") == {(2,): list(store.finished)}


def test_line_that_was_cut_off_is_dropped(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    with store.path.open("a") as file:
        file.write('{"config": {"seed": 1}, "outc')
    other = Store(tmp_path, "squares")
    other.refresh()
    assert {"seed": 1} not in other.finished
    other.append(line(2))
    assert seeds(tmp_path) == [0, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no JSON", "Expecting value"),
        ("[1, 2]", "must be a mapping"),
        ('{"config": {}, "outcome": {}, "seconds": 1.0}', "missing 1 required"),
        ('{"config": 1, "outcome": {}, "seconds": 1.0, "machine": {}}', "have to be objects"),
    ],
)
def test_line_that_is_no_run_is_named(tmp_path, text, problem):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    with store.path.open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match=rf"{store.path}, line 2 is no finished run \(.*{problem}.*\): delete it"):
        Store(tmp_path, "squares").refresh()


def test_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "squares.jsonl"
    path.write_text("notes, without an end of the line")
    with pytest.raises(ValueError, match=rf"{path} is no file of the study"):
        Store(tmp_path, "squares").append(line(0))
    assert path.read_text() == "notes, without an end of the line"


def test_file_that_becomes_shorter_stops_the_study(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0))
    store.path.write_text("")
    with pytest.raises(ValueError, match="has become shorter while the study ran"):
        store.refresh()


def test_numbers_keep_six_digits(tmp_path):
    store = Store(tmp_path, "squares")
    store.append(line(0, value=[1 / 3, {"large": 123456.789}], count=12345678))
    assert store.finished[{"seed": 0}].outcome == {"value": [0.333333, {"large": 123457.0}], "count": 12345678}
