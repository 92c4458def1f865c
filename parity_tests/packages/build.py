"""Build the sdist and the wheel."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Built(NamedTuple):
    sdist: Path
    wheel: Path


def build(folder: Path, source: Path = ROOT) -> Built:
    """Write both into a folder, from a checkout or an unpacked sdist."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder.absolute())]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return Built(next(folder.glob("*.tar.gz")), next(folder.glob("*.whl")))
