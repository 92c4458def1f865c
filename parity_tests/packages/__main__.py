"""`python -m parity_tests.packages`: install the wheel into venvs of their own, and use it there.

Each is installed with one extra alone, at the pinned versions, and runs scripts far from this checkout.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from parity_tests.packages.build import ROOT, build

HERE = Path(__file__).parent
# extra → scripts
USES = {
    "": ("use_bare",),
    "jax": ("use_jax",),
    "torch": ("use_torch",),
    "parity": ("use_parity", "use_jax", "use_torch"),
}
TORCH = "torch==2.13.0"  # ahead of the wheel, as the Makefile does: a build for CPUs, where the index has one


def use(extra: str, wheel: Path, folder: Path, *, python: str, pinned: bool) -> None:
    """Install the wheel with one extra, and run its scripts."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    programs = folder / "venv" / "bin"
    install = [str(programs / "pip"), "install", "--quiet"]
    install += ["--constraint", str(ROOT / "constraints.txt")] if pinned else ["--upgrade"]
    if extra in ("torch", "parity"):
        subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, f"outlook-attention[{extra}] @ {wheel.as_uri()}"], check=True)
    # What the scripts need of the tests, and none of the packages beside it.
    tests = folder / "parity_tests"
    for name in ("support/oracle.py", *(f"packages/{script}.py" for script in USES[extra])):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent / name, tests / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    for script in USES[extra]:
        command = [str(programs / "python"), "-m", f"parity_tests.packages.{script}"]
        subprocess.run(command, cwd=folder, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.packages", description=__doc__)
    parser.add_argument("extras", nargs="*", help="which of bare, jax, torch, parity; all by default")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the venvs")
    parser.add_argument("--newest", action="store_true", help="the newest versions, not the pinned ones")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="outlook-packages-") as temporary:
        wheel = build(Path(temporary) / "dist").wheel
        for extra in [name.replace("bare", "") for name in options.extras] or USES:
            folder = Path(temporary) / (extra or "bare")
            folder.mkdir()
            use(extra, wheel, folder, python=options.python, pinned=not options.newest)
            shutil.rmtree(folder)
            print(f"passed: {extra or 'bare'}", flush=True)


if __name__ == "__main__":
    main()
