"""docs/comparison.md: nothing is claimed of this package that a test does not show."""

import ast
import re

from parity_tests.support.markdown import ROOT

PAGE = (ROOT / "docs" / "comparison.md").read_text()
TABLE, _, TESTS = PAGE.partition("## Tests")


def test_every_claim_is_numbered_and_its_tests_exist() -> None:
    claimed = [int(number) for number in re.findall(r"\[(\d+)\]\(#tests\)", TABLE)]
    named = dict(re.findall(r"^(\d+)\. (.*(?:\n   .*)*)", TESTS, flags=re.MULTILINE))
    assert len(claimed) >= 15
    assert sorted(set(claimed)) == sorted(map(int, named))
    for number, text in named.items():
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
        assert tests, number
        for file, name in tests:
            tree = ast.parse((ROOT / "parity_tests" / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_what_is_said_to_work_has_a_number() -> None:
    rows = [
        line.split("|")[2].strip()
        for line in TABLE.splitlines()
        if line.startswith("| ") and "this package" not in line
    ]
    assert len(rows) >= 15
    unnumbered = [cell for cell in rows if not re.search(r"\[\d+\]\(#tests\)$", cell)]
    assert len(unnumbered) == 2, unnumbered  # no other models; what it is made for
