"""The help of every command."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from outlook_parity.cli.app import app

COMMANDS = ("verify", "trace", "compare", "convert", "inspect", "predict", "models", "explain")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_commands_to_copy_each_on_one_line_of_80_columns(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    help_text, _, examples = result.output.partition("Examples")
    assert "Exit codes: 0" in help_text
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert 3 <= len(lines) <= 4
    assert all(line.startswith("outlook ") for line in lines)


def test_the_program_lists_its_commands() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert all(f"│ {command} " in output for command in COMMANDS)


def test_the_list_of_commands_is_grouped_and_has_examples_and_shell_completion() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    for panel in ("Twins", "Weights", "Models"):
        assert f"─ {panel} ─" in output
    assert "--install-completion" in output
    assert output.partition("Examples")[2].count("outlook ") == 3
    assert len(output.splitlines()) <= 45


def options_of(command: str) -> dict[str | None, list[str]]:
    parameters = get_command(app).commands[command].params
    return {one.name: one.opts for one in parameters if one.param_type_name == "option"}


def test_verify_trace_and_compare_have_the_same_options_under_the_same_names() -> None:
    verify, trace, compare = (options_of(command) for command in ("verify", "trace", "compare"))
    shared = {"model", "weights", "prefix", "torch_factory", "jax_factory", "inputs", "torch_axes", "map_file"}
    shared |= {"dtype", "level", "device", "seed", "num_heads", "kernel_size", "stride", "padding", "quiet"}
    assert shared <= verify.keys() & trace.keys()
    assert {"html", "junit", "verbose", "as_json", "quiet"} <= verify.keys() & compare.keys()
    every = [verify, trace, compare]
    for name in set().union(*every):
        assert len({tuple(options[name]) for options in every if name in options}) == 1, name


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "models"])
def test_every_command_that_may_take_a_second_can_be_quiet(command: str) -> None:
    assert options_of(command)["quiet"] == ["--quiet", "-q"]
