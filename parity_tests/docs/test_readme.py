"""Every Python snippet and every `outlook` command of the README runs as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_has_snippets() -> None:
    assert len(BLOCKS) >= 4


def commands(language: str, block: str) -> list[list[str]]:
    if language == "python":
        return [[sys.executable, "-W", "error", "-c", block]]
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ outlook")]
    return [[str(Path(sys.executable).with_name("outlook")), *shlex.split(line)[1:]] for line in lines]


def test_the_snippets_run_in_order_in_one_folder(tmp_path: Path) -> None:
    """One test, not one per snippet: later ones use the files of earlier ones."""
    for command in [command for language, block in BLOCKS for command in commands(language, block)]:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"}
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
