"""README.md and the pages of docs/: each block of Python and each `outlook` command runs, in order.

A page that says what its blocks need is run where nothing else can be imported: see `parity_tests.support.markdown`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from outlook_parity import WeightEntry, read_name_map
from parity_tests.docs.first_hour import USERS, blocks_of, first_hour, told_what_to_install
from parity_tests.support.arithmetic import QUICK_FLAGS
from parity_tests.support.markdown import ROOT, read_blocks, read_parts, run_page

README, QUICKSTART, SCALING = ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "scaling.md"
# The guides, and the extras that they may need.
GUIDES = {
    "jax": {"jax", "flatbuffers"},
    "torch": {"torch", "timm"},
    "images": {"images"},
    "runtimes": {"parity", "flatbuffers"},
}

# Pages of tables with a block or two.
SHORT = ("weights", "models")


def test_the_pages_have_blocks() -> None:
    assert len(read_blocks(README, "python", "console")) >= 4
    assert sum(command.startswith("outlook ") for block in read_blocks(README, "console") for command in block.commands)
    assert len(read_blocks(SCALING, "python")) >= 9
    assert [part[0].needs for part in read_parts(SCALING)] == [("jax",), ("torch",), ("jax",), ("parity",)]


@pytest.mark.parametrize("extra", USERS)
def test_the_first_hour_of_a_user_of_one_extra_runs_from_the_readme_alone(extra: str, tmp_path: Path) -> None:
    """One test, not one per block: later ones use the files of earlier ones."""
    first_hour(extra, tmp_path)


def test_three_users_together_run_every_block_of_the_readme() -> None:
    every = set(range(len(read_parts(README))))
    runs = {extra: {number for number, _ in blocks_of(extra)} for extra in USERS}
    assert runs["parity"] == every
    assert all(1 < len(runs[extra]) < len(every) for extra in ("jax", "torch"))


@pytest.mark.parametrize("extra", ["jax", "torch"])
def test_who_has_one_twin_is_told_how_to_get_the_other(extra: str) -> None:
    assert told_what_to_install(extra).endswith(f"pip install 'outlook-attention[{USERS[extra]}]'")


@pytest.mark.long(reason="four processes, which verify and train")
def test_every_block_of_the_quickstart_runs_with_what_it_needs_alone(tmp_path: Path) -> None:
    assert {part[0].needs for part in read_parts(QUICKSTART)} == {("jax",), ("torch",), (), ("parity",)}
    run_page(QUICKSTART, tmp_path, "--strict", XLA_FLAGS=QUICK_FLAGS)


def test_the_map_on_the_page_of_its_format_is_read(tmp_path: Path) -> None:
    (block,) = read_blocks(ROOT / "docs" / "reference" / "name-map.md", "toml")
    (tmp_path / "map.toml").write_text(block.text)
    found = read_name_map(tmp_path / "map.toml")
    assert found.weights["blocks.dense.kernel"] == WeightEntry("blocks.#.dense.weight", stack=12, permute=(1, 0))
    assert all((found.modules, found.axes, found.out_axes, found.torch_axes))


def test_no_page_has_a_block_that_no_test_runs() -> None:
    run = {QUICKSTART, SCALING, *(ROOT / "docs" / "guides" / f"{guide}.md" for guide in GUIDES)}
    run |= {ROOT / "docs" / f"{page}.md" for page in SHORT}
    run |= {ROOT / "docs" / "port-a-model.md", ROOT / "docs" / "what-ports-got-wrong.md"}  # by tests of their own
    assert {page for page in (ROOT / "docs").rglob("*.md") if read_blocks(page, "python", "console")} == run


@pytest.mark.parametrize("page", SHORT)
def test_every_block_of_a_short_page_runs_with_what_it_needs_alone(page: str, tmp_path: Path) -> None:
    run_page(ROOT / "docs" / f"{page}.md", tmp_path, "--strict")


@pytest.mark.long(reason="processes that compile for four devices and for other runtimes")
@pytest.mark.parametrize(("guide", "needs"), GUIDES.items())
def test_every_block_of_a_guide_runs_with_what_it_needs_alone(guide: str, needs: set[str], tmp_path: Path) -> None:
    page = ROOT / "docs" / "guides" / f"{guide}.md"
    blocks = read_blocks(page, "python")
    assert len(blocks) >= 2
    assert {need for block in blocks for need in block.needs} == needs
    run_page(page, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {QUICK_FLAGS}")


@pytest.mark.long(reason="five processes that compile for eight devices")
def test_every_block_on_scaling_runs_on_eight_devices(tmp_path: Path) -> None:
    run_page(SCALING, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}")


def test_the_installed_program_starts(tmp_path: Path) -> None:
    """The pages' commands run in a process that is there already: here one starts as a user starts it."""
    program = Path(sys.executable).with_name("outlook")
    done = subprocess.run([program, "verify", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "outlook verify" in done.stdout
