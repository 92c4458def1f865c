"""The report as JSON, JUnit XML and HTML, and as the failure message of the pytest plugin."""

import json
import re
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from outlook_parity import Check, Noise, Report
from outlook_parity.core.check import EXCUSED, SelfNoise
from outlook_parity.pytest_plugin import failure_message
from outlook_parity.report.terminal import print_report
from parity_tests.support import browser

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEMA = json.loads(files("outlook_parity.report").joinpath("report.schema.json").read_text())

NOISE = Noise(0.5, 2.0)


def layer(name: str, view: str, verdict: str = "pass", measured: float = 1e-15, note: str = "") -> Check:
    return Check("layers", "float64", name, verdict, 1e-12, measured, note=note, view=view)


WRONG = Report(
    "mismatch",
    checks=(
        Check("weights", "as given", "v.weight", "pass", 0.0, 0.0),
        Check("forward", "float64", "output", "mismatch", 1e-12, 3e-4),
        Check("forward", "float32", "output", "pass", 8.0, 1.5, NOISE, NOISE),
        Check("gradients", "float64", "v.weight", "pass", 1e-10, 2e-16),
        Check("gradients", "float64", "proj.weight", "mismatch", 1e-10, None, note="missing in jax"),
        Check("gradients", "float64", "k.bias", "pass", 1e-10, 1.0, note=EXCUSED, excused=True),
        Check("gradients", "float64", "q.bias", "pass", 1e-10, 3e-16, note="a note that excuses nothing"),
        Check("gradients", "float32", "v.weight", "pass", 8.0, 1.5, NOISE, NOISE),
        Check("layers", "float64", "drop", "skipped", 0.0, note="called 0 times in torch"),
        *(layer("stem", view) for view in ("propagated", "torch", "jax")),
        layer("blocks.0.norm", "propagated", "mismatch", 2e-4),
        layer("blocks.0.norm", "torch", "mismatch", 2e-4),
        layer("blocks.0.norm", "jax", "mismatch", 2e-4),
        layer("head </script><script>alert(1)</script>", "propagated", "mismatch", 3e-4),
    ),
    first_divergence="blocks.0.norm",
    cause="LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm",
    differences=("LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm",),
    notes=("torch is not deterministic, or keeps state: called twice its outputs differ by 1e-3",),
    self_noise=(
        SelfNoise("torch", "float64", "called twice", 1e-3, 4.5e12),
        SelfNoise("jax", "float64", "called twice", 0, 0),
    ),
    curves={"SGD": {"torch": [3.0, 2.5, 2.25], "jax": [3.0, 2.5, 2.2500001]}},
    environment={"torch": "2.13.0", "jax": "0.10.2"},
)
NOT_RUN = Report("not-run", reason="JAX has no gpu here")


@pytest.mark.parametrize("report", [WRONG, NOT_RUN], ids=["mismatch", "not run"])
def test_the_json_is_as_the_published_schema_says(report: Report) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [{"version": 3}, {"verdict": "ok"}, {"checks": [{"level": "forward"}]}, {"surprise": 1}, {"environment": None}],
    ids=str,
)
def test_the_schema_refuses_what_no_report_is(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(WRONG.to_json()) | change, SCHEMA)


def test_junit_has_a_case_per_check_and_a_failure_per_mismatch(tmp_path: Path) -> None:
    WRONG.to_junit(tmp_path / "r.xml")
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    cases = root.findall(".//testcase")
    assert len(cases) == len(WRONG.checks) == int(root.attrib["tests"])
    assert len(root.findall(".//failure")) == 6 == int(root.attrib["failures"])
    messages = [failure.attrib["message"] for failure in root.iter("failure")]
    assert messages[:2] == ["found 0.0003, at most 1e-12", "missing in jax"]
    NOT_RUN.to_junit(tmp_path / "n.xml")
    assert "no gpu" in ElementTree.parse(tmp_path / "n.xml").find(".//skipped").attrib["message"]


def test_the_failure_message_is_short_and_says_where_and_why() -> None:
    lines = failure_message(WRONG).splitlines()
    assert lines[0].startswith("MISMATCH: 6 of")
    assert lines[0].endswith("LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm")
    assert lines[1] == "first wrong: blocks.0.norm"
    assert lines[2] == "  layers, float64: blocks.0.norm (torch): found 0.0002, at most 1e-12"
    assert len(lines) < 16


def test_the_page_needs_no_network_and_no_name_can_break_it(tmp_path: Path) -> None:
    WRONG.to_html(tmp_path / "r.html", title="two <b>models</b>")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2


@pytest.mark.skipif(browser.absence() is not None, reason=str(browser.absence()))
def test_the_page_opens_in_a_browser_and_a_failing_module_can_be_chosen(tmp_path: Path) -> None:
    WRONG.to_html(tmp_path / "r.html", title="two models")
    with browser.chromium(tmp_path / "profile") as page:
        for width in (1200, 380):
            page.resize(width, 800)
            page.open(tmp_path / "r.html")
            assert page.text("#verdict strong") == "MISMATCH"
            assert page.text("#first") == "blocks.0.norm"
            assert page.text("#notes p").startswith("Note: torch is not deterministic")
            assert page.run("return [...document.querySelectorAll('#noise td')].map(c => c.textContent)") == [
                *("torch", "float64", "4.5e+12 units"),
                *("jax", "float64", "equal"),
            ]
            assert page.run("return document.querySelectorAll('.strip button').length") == 3
            assert page.run("return document.querySelectorAll('.strip button.bad').length") == 1
            page.click(".strip button[data-module=stem]")
            assert page.text("#module h3") == "stem"
            page.click(".strip button.bad")
            assert page.text("#module h3") == "blocks.0.norm"
            assert page.text("#module td.mismatch") == "mismatch"
            assert page.run("return document.querySelectorAll('#charts svg').length") == 3
            # Of the gradients in float64 those that were measured and are not excused.
            assert page.run("return document.querySelector('#charts figure').querySelectorAll('circle').length") == 2
            page.click("summary")
            page.run(
                "const f = document.getElementById('filter'); f.value = 'gradients float64';"
                "f.dispatchEvent(new Event('input'))"
            )
            assert page.run("return document.querySelectorAll('#rows tr').length") == 5  # the head, and four
            assert page.run("return document.documentElement.scrollWidth") <= width
            assert len(page.picture()) > 10_000
        assert page.errors() == []


def test_an_excused_row_is_not_the_largest_error_of_a_report_that_passes() -> None:
    rows = [row for row in WRONG.checks if row.verdict == "pass" and row.dtype == "float64"]
    assert max(row.measured or 0.0 for row in rows) == 1.0
    assert "largest relative error 1.0e-15" in str(Report("pass", tuple(rows)))


def test_notes_that_are_left_out_on_a_terminal_are_counted() -> None:
    console = Console(width=120, record=True, file=StringIO())
    differences = tuple(f"LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.{n}" for n in range(8))
    print_report(Report("pass", differences=differences), console)
    assert "note: … and 3 more such differences" in console.export_text()


def test_no_message_is_longer_than_2000_characters_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    long = "module, " * 1000
    row = Check("forward", "float64", "output", "mismatch", 1e-12, note=long)
    report = Report("mismatch", checks=(row,), cause=long)
    report.to_junit(tmp_path / "r.xml")
    failure = ElementTree.parse(tmp_path / "r.xml").find(".//failure").attrib["message"]
    for message in (str(report), failure, str(Report("not-run", reason=long))):
        assert 1900 < len(message) <= 2000
        left_out = re.search(r" … and (\d+) more characters$", message)[1]
        assert int(left_out) > 5900
    assert json.loads(report.to_json())["cause"] == long  # whole
