"""The text below the options of a command's help."""


def epilog(*examples: str) -> str:
    """Return commands to copy, one a line."""
    return "\n".join(["[bold]Examples[/]", "", *(f"  {example}" for example in examples)])
