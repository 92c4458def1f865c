"""Run a module of the tests in a process of its own, with several CPU devices for JAX, and read what it prints."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from parity_tests.support.arithmetic import QUICK_FLAGS


def run_on_devices(module: str, devices: int, *arguments: str, timeout: int = 600) -> Any:
    """Return the JSON that `python -m module` prints where JAX has so many CPU devices; they compile quickly."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.support.quick_process", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_in_processes(
    module: str, processes: int, devices: int, names: str | None, folder: object, timeout: int = 600
) -> Any:
    """Return what each of several processes prints, which share so many devices for JAX, each having its part."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(process: int) -> Any:
        arguments = map(str, (*filter(None, [names]), process, processes, port, folder))
        return run_on_devices(module, devices // processes, *arguments, timeout=timeout)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))
