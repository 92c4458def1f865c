"""Losses and accuracies as lines of JSON, and for TensorBoard where tensorboardX is installed."""

import json
from pathlib import Path


class Log:
    """One line per step in `<folder>/metrics.jsonl`; of steps that ran twice the last line counts."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.path, self.writes = folder / "metrics.jsonl", writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(folder)) if writes else None

    def write(self, step: int, **values: float) -> None:
        """Write what was measured in a step."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def read(folder: Path) -> dict[int, dict[str, float]]:
    """Return what was written, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values.pop("step"), {}).update(values)
    return found
