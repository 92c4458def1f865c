"""The report as JUnit XML, which CI systems show: one suite per level and dtype, one case per check."""

from itertools import groupby
from xml.etree import ElementTree

from outlook_parity.report import Check, Report, sentence


def to_junit(report: Report) -> str:
    """Return the XML; what mismatches is a failure, what did not run is skipped."""
    root = ElementTree.Element("testsuites", name="outlook verify", tests=str(len(report.checks)))
    root.set("failures", str(_count(report.checks, "mismatch")))
    groups = [(key, list(rows)) for key, rows in groupby(report.checks, key=lambda check: (check.level, check.dtype))]
    for (level, dtype), rows in groups or [(("not run", ""), [])]:
        suite = ElementTree.SubElement(root, "testsuite", name=f"{level}, {dtype}", tests=str(len(rows)))
        suite.set("failures", str(_count(rows, "mismatch")))
        suite.set("skipped", str(_count(rows, "not-run")))
        for row in rows:
            _case(suite, row)
        if not rows:
            case = ElementTree.SubElement(suite, "testcase", classname="outlook", name="verify")
            ElementTree.SubElement(case, "skipped", message=sentence(report))
    ElementTree.SubElement(root[0], "system-out").text = sentence(report)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, row: Check) -> None:
    name = row.name + (f" ({row.view})" if row.view else "")
    case = ElementTree.SubElement(suite, "testcase", classname=f"{row.level}.{row.dtype}", name=name)
    if row.verdict == "mismatch":
        found = row.note or f"found {row.measured:.3g}, at most {row.bound:.3g}"
        ElementTree.SubElement(case, "failure", message=found, type="mismatch")
    elif row.verdict == "not-run":
        ElementTree.SubElement(case, "skipped", message=row.note)


def _count(rows: tuple[Check, ...] | list[Check], verdict: str) -> int:
    return sum(row.verdict == verdict for row in rows)
