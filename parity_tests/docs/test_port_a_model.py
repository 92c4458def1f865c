"""docs/port-a-model.md: a model that is not ours, ported with two mistakes, found and mended as the page says."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from outlook_parity import NameMap, Report, verify
from outlook_parity.models.user import load_factory
from parity_tests.support.markdown import ROOT, read_blocks

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = ROOT / "docs" / "port-a-model.md"
# A file is a block that starts with its name.
NAMED = re.compile(r"# (\S+\.\w+)\n(.*)", flags=re.DOTALL)
FILES = [match.groups() for block in read_blocks(PAGE, "python", "toml") if (match := NAMED.fullmatch(block.text))]
MENDS = [re.fullmatch(r"-(.*)\n\+(.*)\n", block.text).groups() for block in read_blocks(PAGE, "diff")]
COMMANDS = [command for block in read_blocks(PAGE, "console") for command in block.commands]
STEPS = [step for block in read_blocks(PAGE, "yaml") for step in yaml.safe_load(block.text)["jobs"]["parity"]["steps"]]


def write_files(folder: Path, mended: int = 0) -> None:
    for name, text in FILES:
        for before, after in MENDS[:mended]:
            text = text.replace(before, after)
        (folder / name).write_text(text)


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Report]]:
    """Verify the port with so many of the mistakes mended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def run(mended: int) -> Report:
        write_files(tmp_path, mended)
        for name in ("convnext_jax", "convnext_torch"):
            sys.modules.pop(name, None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        models = load_factory("convnext_torch:model", "--torch"), load_factory("convnext_jax:model", "--jax")
        images = np.random.default_rng(0).standard_normal((2, 16, 16, 3))
        return verify(*models, images, levels=("layers",), dtypes=("float64",), names=NameMap(torch_axes=(0, 3, 1, 2)))

    yield run
    for name in ("convnext_jax", "convnext_torch"):
        sys.modules.pop(name, None)


def test_the_mistakes_are_found_one_after_the_other_and_the_mended_port_passes(port: Callable[[int], Report]) -> None:
    assert len(MENDS) == 2
    first, second, last = port(0), port(1), port(2)
    assert (first.verdict, first.first_divergence) == ("mismatch", "blocks.0.norm")
    assert first.cause == "LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm"
    assert (second.verdict, second.first_divergence) == ("mismatch", "blocks.0")
    assert second.cause == "Block GELU tanh in jax, exact in torch, at blocks.0"
    assert last.verdict == "pass", [row for row in last.checks if row.verdict == "mismatch"]
    compared = {row.name for row in last.checks if row.level == "layers" and row.verdict == "pass"}
    assert {"stem", "blocks.0.dwconv", "blocks.0.norm", "blocks.1.pwconv2", "blocks.1", "head"} <= compared


@pytest.mark.slow(reason="every command of the page, each a process that compiles: minutes")
def test_every_command_of_the_page_runs_as_printed(tmp_path: Path) -> None:
    assert len(COMMANDS) >= 5
    bin_folder = Path(sys.executable).parent

    def run(command: str, expected: int = 0) -> str:
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [str(bin_folder / program), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    write_files(tmp_path)
    run(COMMANDS[0])
    assert "LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.0.norm" in run(COMMANDS[1], expected=1)
    write_files(tmp_path, mended=1)
    assert "GELU tanh in jax, exact in torch, at blocks.0" in run(COMMANDS[1], expected=1)
    write_files(tmp_path, mended=2)
    assert "PASS: the twins are equal to rounding in float64" in run(COMMANDS[1])
    for command in COMMANDS[2:]:
        run(command)
    workflow = [step["run"] for step in STEPS if "run" in step]
    assert workflow[0] == "pip install 'outlook-attention[parity]'"
    for command in workflow[1:]:
        run(command)
    assert {"parity.html", "parity.xml"} <= {path.name for path in tmp_path.iterdir()}
    run("pytest -q -p no:cacheprovider test_port.py")
