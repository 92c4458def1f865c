"""The first hour of three users, from README.md alone: `python -m parity_tests.docs.first_hour [jax] [torch] [parity]`.

Each has installed one extra, and runs, in a folder of their own, every block that it is enough for. Then they ask for
what it is not enough for, and must be told what to install.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from parity_tests.support.arithmetic import QUICK_FLAGS
from parity_tests.support.environment import installed_by
from parity_tests.support.markdown import ROOT, Block, read_parts, run_part

README = ROOT / "README.md"
# Extra -> what a user of it asks for in vain.
USERS = {"jax": "torch", "torch": "jax", "parity": None}
# The models run once, and take far longer to optimize.
QUICK = {"XLA_FLAGS": QUICK_FLAGS}

WITHOUT = """
from parity_tests.support.environment import hide_all_but
hide_all_but(["{extra}"])
try:
    import outlook_{missing}
except ImportError as error:
    print(error)
"""


def blocks_of(extra: str) -> list[tuple[int, list[Block]]]:
    """Return the parts of README.md that an extra is enough for, with their numbers."""
    present = installed_by([extra])
    return [(number, part) for number, part in enumerate(read_parts(README)) if installed_by(part[0].needs) <= present]


def first_hour(extra: str, folder: Path) -> None:
    """Run what a user of an extra runs, each block in turn; fail with the first that does not run."""
    parts = blocks_of(extra)
    assert parts, f"README.md has nothing for a user of [{extra}]"
    for number, part in parts:
        started = time.monotonic()
        run_part(README, number, folder, "--strict", f"--with={extra}", **QUICK)
        print(f"[{extra}] README.md, line {part[0].line}: {time.monotonic() - started:.1f} s")


def told_what_to_install(extra: str) -> str:
    """Return what is said to a user who imports the other twin."""
    script = WITHOUT.format(extra=extra, missing=USERS[extra])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def main() -> None:
    for extra in sys.argv[1:] or USERS:
        with TemporaryDirectory() as folder:
            first_hour(extra, Path(folder))
        if USERS[extra] is not None:
            print(f"[{extra}] {told_what_to_install(extra)}")


if __name__ == "__main__":
    main()
