"""Fenced blocks of a Markdown page, read or run: `python -m parity_tests.support.markdown README.md 0`.

A comment `<!-- needs: jax -->` names the extras of this package, and other packages, that the blocks behind it need, up
to the next such comment: these blocks, a part of the page, run in one process of the current folder that can import
nothing else; `<!-- needs: -->` means the bare package. (A process per block took most of the time for imports.) A page
without such a comment needs `parity`.

Blocks of Python and the lines `$ outlook …` of console sessions run; each block of Python has its own names, or with
`--one-namespace` those of the blocks before it in this part. With `--strict` warnings are errors.
"""

import os
import re
import shlex
import subprocess
import sys
import warnings
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from parity_tests.support.environment import hide_all_but
from parity_tests.support.quick_process import save_time

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"^<!-- needs:(.*)-->$", flags=re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of its first line, counted from 1
    needs: tuple[str, ...] = ("parity",)

    @property
    def commands(self) -> list[str]:
        """The commands of a console session, without their prompts."""
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]


def read_blocks(page: Path, *languages: str) -> list[Block]:
    """Return a page's blocks in these languages, in order."""
    text = page.read_text()
    needs = {found.start(): tuple(found[1].split()) for found in NEEDS.finditer(text)}
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        before = [position for position in needs if position < match.start()]
        blocks.append(Block(match[1], match[2], line, *([needs[max(before)]] if before else [])))
    return [block for block in blocks if block.language in languages]


def read_parts(page: Path) -> list[list[Block]]:
    """Return the blocks that run, by process: neighbours that need the same are one."""
    return [list(part) for _, part in groupby(read_blocks(page, "python", "console"), key=attrgetter("needs"))]


def run_page(page: Path, folder: Path, *options: str, **environment: str) -> None:
    """Run a page's blocks, each part in a process of its own; fail with its standard error."""
    for part in range(len(read_parts(page))):
        run_part(page, part, folder, *options, **environment)


def run_part(page: Path, part: int, folder: Path, *options: str, **environment: str) -> None:
    """Run one part of a page; with the option `--with=jax` where that is installed rather than what the part needs."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.support.markdown", str(page), str(part), *options],
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
    page, part, one_namespace = Path(sys.argv[1]), int(sys.argv[2]), "--one-namespace" in sys.argv
    blocks = read_parts(page)[part]
    installed = [option.removeprefix("--with=") for option in sys.argv if option.startswith("--with=")]
    hide_all_but(installed or blocks[0].needs)
    if "timm" in blocks[0].needs:
        from benchmarks.torchvision_stub import declare_missing_torchvision_operators

        declare_missing_torchvision_operators()
    save_time()
    if "--strict" in sys.argv:
        warnings.simplefilter("error")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            _run_python(block, page, names if one_namespace else dict(names))
        for command in block.commands:
            if command.startswith("outlook "):
                _run_outlook(command)


if __name__ == "__main__":
    main()
