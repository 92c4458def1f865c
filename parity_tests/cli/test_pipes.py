"""Output into `head`, and Ctrl-C."""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outlook_common.config import VOLO_VARIANTS
from outlook_common.weights import table_for, write_arrays
from outlook_common.weights.io.interrupts import InterruptedSafelyError, deferred_interrupts
from outlook_parity import verify
from outlook_parity.cli.verify import RunOptions
from parity_tests.weights.layers import WEIGHTS

OUTLOOK = [sys.executable, "-c", "from outlook_parity.cli.app import main; main()"]


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
@pytest.mark.parametrize("options", [[], ["--json"], ["--manifest"]])
def test_output_that_nobody_reads_ends_quietly_as_in_other_tools(tmp_path: Path, options: list[str]) -> None:
    write_arrays(tmp_path / "a.npz", WEIGHTS)
    command = [*OUTLOOK, "inspect", "--quiet", str(tmp_path / "a.npz"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == -signal.SIGPIPE  # 141 in a shell, as of `cat`


def test_training_steps_have_one_default() -> None:
    assert inspect.signature(verify).parameters["steps"].default == RunOptions.steps


@pytest.mark.slow  # converts 107 MB several times
def test_an_interrupted_orbax_conversion_leaves_no_hidden_folder(tmp_path: Path) -> None:
    entries = table_for(VOLO_VARIANTS["volo_d1_224"].config).entries
    arrays = {entry.torch: np.ones(entry.shape, entry.dtype or "f4") for entry in entries}
    write_arrays(tmp_path / "a.safetensors", arrays)
    target = tmp_path / "target"
    target.mkdir()
    command = [*OUTLOOK, "convert", str(tmp_path / "a.safetensors"), str(target / "b.orbax")]
    interrupted = 0
    for delay in (0, 0.1, 0.2, 0.3, 0.4):  # while its libraries are imported, while it writes, while it reads back
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not any(target.iterdir()):
                time.sleep(0.001)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            process.communicate()
        interrupted += process.returncode == 130
        assert process.returncode in (0, 130)  # it may have been done
        assert {file.name for file in target.iterdir()} <= {"b.orbax"}
    assert interrupted > 0


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Interrupts raise, also where this process was started in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_interrupts_wait_until_it_is_safe() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as check:  # noqa: PT012
        check()
        os.kill(os.getpid(), signal.SIGINT)
        done.append("went on")
        try:
            check()
        except InterruptedSafelyError:
            done.append("stopped")
            raise
    assert done == ["went on", "stopped"]
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
