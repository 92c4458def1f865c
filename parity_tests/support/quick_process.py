"""Run a module while doing less beside it: `python -m parity_tests.support.quick_process MODULE ARGUMENTS…`."""

import gc
import runpy
import sys
from importlib.util import find_spec


def save_time() -> None:
    """Let this process collect garbage seldom, as programs are many small objects that stay, and reuse contexts."""
    gc.set_threshold(10_000)
    if find_spec("jax"):
        from parity_tests.support.contexts import reuse_contexts

        reuse_contexts()


if __name__ == "__main__":
    save_time()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
