"""The report as JUnit XML, which CI systems show: one suite per level and dtype, one case per check."""

from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree

from outlook_parity.core.check import Check


def to_junit(checks: Sequence[Check], sentence: str) -> str:
    """Return rows and the verdict in words as XML; what mismatches is a failure, what did not run is skipped."""
    root = ElementTree.Element("testsuites", name="outlook verify", tests=str(len(checks)))
    root.set("failures", str(_count(checks, "mismatch")))
    groups = [(key, list(rows)) for key, rows in groupby(checks, key=lambda check: (check.level, check.dtype))]
    for (level, dtype), rows in groups or [(("not run", ""), [])]:
        suite = ElementTree.SubElement(root, "testsuite", name=f"{level}, {dtype}", tests=str(len(rows)))
        suite.set("failures", str(_count(rows, "mismatch")))
        suite.set("skipped", str(_count(rows, "not-run")))
        for row in rows:
            _case(suite, row)
        if not rows:
            case = ElementTree.SubElement(suite, "testcase", classname="outlook", name="verify")
            ElementTree.SubElement(case, "skipped", message=sentence)
    ElementTree.SubElement(root[0], "system-out").text = sentence
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


def _count(rows: Sequence[Check], verdict: str) -> int:
    return sum(row.verdict == verdict for row in rows)
