"""The environments that pages run in: an extra's packages can be imported, and no others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.support.environment import installed_by
from parity_tests.support.markdown import ROOT, read_parts


def imported(need: str, module: str) -> str:
    script = f"""
from parity_tests.support.environment import hide_all_but
hide_all_but([{need!r}])
from importlib import metadata, util
print(util.find_spec({module!r}) is not None, end=" ")
try:
    metadata.version({module!r})
    import {module}
except ImportError:
    print("absent")
else:
    print("there")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("need", "there", "absent"),
    [("jax", "flax", "torch"), ("torch", "torch", "jax"), ("jax", "optax", "matplotlib"), ("pillow", "numpy", "jax")],
)
def test_an_extra_brings_its_packages_and_no_others(need: str, there: str, absent: str) -> None:
    assert imported(need, there) == "True there"
    assert imported(need, absent) == "False absent"


def test_an_extra_brings_what_its_packages_require() -> None:
    assert {"jaxlib", "optax", "orbax-checkpoint", "numpy"} <= installed_by(["jax"])
    assert {"torch", "jax", "matplotlib"} <= installed_by(["parity"])
    assert not {"torch", "jax"} & installed_by([])


def test_what_was_imported_too_early_is_an_error() -> None:
    script = 'import jax; from parity_tests.support.environment import hide_all_but; hide_all_but(["torch"])'
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"imported before they were hidden: \[.*'jax'", done.stderr)


def test_a_part_of_a_page_ends_where_its_needs_change(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    blocks = ["```python\na = 1\n```", "<!-- needs: jax -->", "```python\nb = 1\n```", "```python\nc = 1\n```"]
    blocks += ["<!-- needs: torch timm -->", "```python\nd = 1\n```"]
    page.write_text("\n\n".join(blocks))
    parts = [(part[0].needs, [block.text for block in part]) for part in read_parts(page)]
    assert parts == [
        (("parity",), ["a = 1\n"]),
        (("jax",), ["b = 1\n", "c = 1\n"]),
        (("torch", "timm"), ["d = 1\n"]),
    ]
