"""docs/how-to.md: every block runs as printed, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)

# Small models run in no time, but take seconds to compile.
QUICKLY = "--xla_backend_optimization_level=0"


def test_every_block_runs_on_four_devices(tmp_path: Path) -> None:
    assert len(BLOCKS) >= 10
    (tmp_path / "page.py").write_text("\n".join(BLOCKS))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICKLY}"},
    )
    assert done.returncode == 0, done.stderr
