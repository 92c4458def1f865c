"""The small ConvNeXt of docs/port-a-model.md, with its two mistakes mended."""

import re
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "port-a-model.md"
FILE = re.compile(r"^```python\n# (convnext_\w+\.py)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MENDING = re.compile(r"^```diff\n-(.*)\n\+(.*)\n```$", flags=re.MULTILINE)


def models() -> tuple[Any, Any]:
    """Return both twins as the page has them in the end."""
    text = PAGE.read_text()
    with TemporaryDirectory() as folder:
        for name, code in FILE.findall(text):
            for before, after in MENDING.findall(text):
                code = code.replace(before, after)
            (Path(folder) / name).write_text(code)
        sys.path.insert(0, folder)
        try:
            return import_module("convnext_torch").model(), import_module("convnext_jax").model()
        finally:
            sys.path.remove(folder)
