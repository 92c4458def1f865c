"""docs/what-ports-got-wrong.md: every block of Python shows what the page says, of the packages that are installed."""

import re
import warnings
from typing import Any

import pytest

from benchmarks.torchvision_stub import declare_missing_torchvision_operators
from parity_tests.support.markdown import ROOT, Block, read_blocks

PAGE = ROOT / "docs" / "what-ports-got-wrong.md"
BLOCKS = read_blocks(PAGE, "python")
(COMMON,) = (block for block in BLOCKS if block.text.startswith("# Common"))


def _run(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, PAGE, "exec"), names)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block is not COMMON], ids=lambda block: f"line {block.line}"
)
def test_a_block_shows_what_the_page_says(block: Block) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    declare_missing_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that nobody mends any more
        if "port(" in block.text:
            pytest.importorskip("transformers", reason="not run: transformers is not installed")
            pytest.importorskip("transformers.modeling_flax_utils", reason="not run: transformers without Flax")
            _run(COMMON, names)
        elif "equimo" in block.text:
            pytest.importorskip("equimo", reason="not run: equimo is not installed")
        _run(block, names)


def test_every_port_of_the_table_has_its_section() -> None:
    text = PAGE.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) == 14
    assert set(links) <= headings
