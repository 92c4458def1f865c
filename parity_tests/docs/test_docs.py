"""README.md and the pages of docs/: each block of Python and each `outlook` command runs, in order.

A page that says what its blocks need is run where nothing else can be imported: see `parity_tests.support.markdown`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.support.markdown import ROOT, read_blocks, read_parts, run_page

README, SCALING = ROOT / "README.md", ROOT / "docs" / "scaling.md"
# The guides, and the extras that they may need.
GUIDES = {"jax": {"jax", "flatbuffers"}, "torch": {"torch", "timm"}, "images": {"pillow"}}

# The pages' models run once, and take far longer to optimize.
QUICK = "--xla_backend_optimization_level=0"


def test_the_pages_have_blocks() -> None:
    assert len(read_blocks(README, "python", "console")) >= 4
    assert sum(command.startswith("outlook ") for block in read_blocks(README, "console") for command in block.commands)
    assert len(read_blocks(SCALING, "python")) >= 9
    assert [part[0].needs for part in read_parts(SCALING)] == [("jax",), ("torch",), ("jax",)]


def test_every_block_of_the_readme_runs_in_one_folder(tmp_path: Path) -> None:
    """One test, not one per block: later ones use the files of earlier ones."""
    run_page(README, tmp_path, "--strict", XLA_FLAGS=QUICK)


@pytest.mark.parametrize(("guide", "needs"), GUIDES.items())
def test_every_block_of_a_guide_runs_with_what_it_needs_alone(guide: str, needs: set[str], tmp_path: Path) -> None:
    page = ROOT / "docs" / "guides" / f"{guide}.md"
    blocks = read_blocks(page, "python")
    assert len(blocks) >= 2
    assert {need for block in blocks for need in block.needs} == needs
    run_page(page, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {QUICK}")


def test_every_block_on_scaling_runs_on_eight_devices(tmp_path: Path) -> None:
    run_page(SCALING, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")


def test_the_installed_program_starts(tmp_path: Path) -> None:
    """The pages' commands run in a process that is there already: here one starts as a user starts it."""
    program = Path(sys.executable).with_name("outlook")
    done = subprocess.run([program, "verify", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "outlook verify" in done.stdout
