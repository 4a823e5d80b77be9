"""Tables and character curves."""

from __future__ import annotations

import math

from clusterssl.report.tables import Table, shown, sparkline, table_of


def test_text_table_aligns_its_columns() -> None:
    table = Table("T", ("", "k-NN", "NMI"), (("raw pixels", "97.8", "5"), ("net", "9", "71.25")), "a note")
    lines = table.text().splitlines()
    assert lines[0] == "T" and lines[-1] == "a note"
    body = [line for line in lines[1:-1] if not line.startswith("-")]
    assert {len(line) for line in body} == {len(body[0])}
    assert body[1].split("  ")[0] == "raw pixels" and body[1].endswith("    5") and body[2].endswith("71.25")


def test_sparkline_follows_the_values() -> None:
    line = sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert line == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0] * 3) == "▁▁▁"
    assert sparkline([]) == "" and sparkline([math.nan]) == ""
    assert sparkline([math.inf, 0.0, 1.0]) == "▁█"
    assert len(sparkline(list(range(1000)), width=40)) == 40
    assert sparkline([0, 9], blocks="_#") == "_#"


def test_shown_is_for_readers() -> None:
    assert [shown(value) for value in (1.0, 0.123456, [2, 6], None, True, {"a": 1.5}, math.nan)] == [
        "1", "0.1235", "2 6", "", "True", "a 1.5", "nan",
    ]  # fmt: skip


def test_table_of_records_with_different_keys() -> None:
    table = table_of("T", [{"eval": "knn", "a": 1}, {"b": 2.5}], leave_out=("eval",))
    assert table.columns == ("a", "b") and table.rows == (("1", ""), ("", "2.5"))
