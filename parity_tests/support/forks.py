"""Run scripts, each in a process of its own that has PyTorch and its compilers imported already.

Importing them takes seconds; here one process does, and every script runs in a fork of it, which may crash for itself.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from types import ModuleType

LIMIT = 600  # seconds, after which a script is ended


class Forks:
    """Runs Python scripts in forks of one process with PyTorch imported; to be closed."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: str) -> tuple[int, str]:
        """Return the script's exit status, negative for a signal, and what it printed."""
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        print(json.dumps(script), file=self.parent.stdin, flush=True)
        line = self.parent.stdout.readline()
        assert line, f"the process to fork ended with status {self.parent.wait()}"
        status, output = json.loads(line)
        return status, output

    def close(self) -> None:
        """End the process that is forked."""
        self.parent.communicate()


def _run(script: str) -> int:
    """Run the script as the program of this process, and return its exit status."""
    program = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(script, "<script>", "exec"), program.__dict__)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forked(script: str) -> tuple[int, str]:
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            for stream in (1, 2):
                os.dup2(printed.fileno(), stream)
            status = _run(script)
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(status), printed.read().decode(errors="replace")


def main() -> None:
    """Answer each line of input, a script in JSON, with its exit status and what it printed."""
    import torch._dynamo
    import torch._functorch.aot_autograd
    import torch._inductor.compile_fx
    import torch.export._trace  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
