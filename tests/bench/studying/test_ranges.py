"""The least and the largest of numbers over settings."""

from bench.studying.ranges import ranges


def test_ranges_are_those_of_all_keys_that_begin_alike():
    values = [(("slope", 60, "clean"), 1.0), (("slope", 60, "wrong"), -3.0), (("slope", 0, "clean"), 7.0)]
    assert ranges(values, shortest=1) == {
        "slope.least": "-3.00",
        "slope.60.least": "-3.00",
        "slope.60.clean.least": "1.00",
        "slope.60.wrong.least": "-3.00",
        "slope.0.least": "7.00",
        "slope.0.clean.least": "7.00",
        "slope.largest": "7.00",
        "slope.60.largest": "1.00",
        "slope.60.clean.largest": "1.00",
        "slope.60.wrong.largest": "-3.00",
        "slope.0.largest": "7.00",
        "slope.0.clean.largest": "7.00",
    }
    assert ranges(values[:1], shortest=3, text="{:.0%}".format) == {
        "slope.60.clean.least": "100%",
        "slope.60.clean.largest": "100%",
    }
