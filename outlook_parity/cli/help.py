"""The text below the options of a command's help."""

import re

import typer

# Typer before 0.27.1 makes a line of each paragraph; since then it keeps lines and the empty ones between paragraphs.
_KEEPS_LINES = tuple(map(int, re.findall(r"\d+", typer.__version__)[:3])) >= (0, 27, 1)


def epilog(*examples: str) -> str:
    """Return commands to copy, one a line."""
    lines = ["[bold]Examples[/]", *([""] if _KEEPS_LINES else []), *(f"  {example}" for example in examples)]
    return ("\n" if _KEEPS_LINES else "\n\n").join(lines)
