"""Fenced blocks of a Markdown page, read or run: `python -m parity_tests.support.markdown README.md`.

One process runs a whole page in the current folder: a process per block, each importing both frameworks, took most of
the time. Blocks of Python and the lines `$ outlook …` of console sessions run; each block of Python has its own names,
or with `--one-namespace` those of the blocks before it. Warnings are errors.
"""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line, counted from 1

    @property
    def commands(self) -> list[str]:
        """The commands of a console session, without their prompts."""
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]


def read_blocks(page: Path, *languages: str) -> list[Block]:
    """Return a page's blocks in these languages, in order."""
    text = page.read_text()
    found = (Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(text))
    return [block for block in found if block.language in languages]


def run_page(page: Path, folder: Path, *options: str, **environment: str) -> None:
    """Run a page's blocks in a process of its own; fail with its standard error."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.support.markdown", str(page), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", **environment},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def _run_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    # Empty lines in front: a traceback then tells the line of the page.
    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)


def _run_outlook(command: str) -> None:
    """Run a command of this package as its console script does, in this process."""
    from outlook_parity.cli.app import main

    sys.argv = shlex.split(command)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{command} ended with exit code {end.code}") from end


def main() -> None:
    page, one_namespace = Path(sys.argv[1]), "--one-namespace" in sys.argv
    if "--strict" in sys.argv:
        warnings.simplefilter("error")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page, "python", "console"):
        if block.language == "python":
            _run_python(block, page, names if one_namespace else dict(names))
        for command in block.commands:
            if command.startswith("outlook "):
                _run_outlook(command)


if __name__ == "__main__":
    main()
