"""README.md, docs/how-to.md and docs/scaling.md: each block of Python and each `outlook` command runs, in order."""

import subprocess
import sys
from pathlib import Path

from parity_tests.support.markdown import ROOT, read_blocks, run_page

README, HOW_TO, SCALING = ROOT / "README.md", ROOT / "docs" / "how-to.md", ROOT / "docs" / "scaling.md"

# The pages' models run once, and take far longer to optimize.
QUICK = "--xla_backend_optimization_level=0"


def test_the_pages_have_blocks() -> None:
    assert len(read_blocks(README, "python", "console")) >= 4
    assert sum(command.startswith("outlook ") for block in read_blocks(README, "console") for command in block.commands)
    assert len(read_blocks(HOW_TO, "python")) >= 10
    assert len(read_blocks(SCALING, "python")) >= 9


def test_every_block_of_the_readme_runs_in_one_folder(tmp_path: Path) -> None:
    """One test, not one per block: later ones use the files of earlier ones."""
    run_page(README, tmp_path, "--strict", XLA_FLAGS=QUICK)


def test_every_block_of_the_how_to_runs_on_four_devices(tmp_path: Path) -> None:
    run_page(HOW_TO, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {QUICK}")


def test_every_block_on_scaling_runs_on_eight_devices(tmp_path: Path) -> None:
    run_page(SCALING, tmp_path, "--one-namespace", XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")


def test_the_installed_program_starts(tmp_path: Path) -> None:
    """The pages' commands run in a process that is there already: here one starts as a user starts it."""
    program = Path(sys.executable).with_name("outlook")
    done = subprocess.run([program, "verify", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "outlook verify" in done.stdout
