"""The help of every command."""

import pytest
from typer.testing import CliRunner

from outlook_parity.cli.app import app

COMMANDS = ("verify", "trace", "compare", "convert", "inspect", "predict", "models")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_three_commands_to_copy_each_on_one_line_of_80_columns(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    help_text, _, examples = result.output.partition("Examples")
    assert "Exit codes: 0" in help_text
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert len(lines) == 3
    assert all(line.startswith("outlook ") for line in lines)


def test_the_program_lists_its_commands() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert all(f"│ {command} " in output for command in COMMANDS)
