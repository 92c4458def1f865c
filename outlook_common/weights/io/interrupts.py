"""Ctrl-C at moments that are safe: libraries with threads of their own crash, or go on writing, when it comes amid."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class InterruptedSafelyError(Exception):
    """Ctrl-C was pressed; an ordinary exception, which event loops pass on."""


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C in the block; yield a function to call where it is safe, which raises `InterruptedSafelyError`.

    A second Ctrl-C is not held back. In threads, which get no signals, nothing is done.

    Raises:
        KeyboardInterrupt: at the end of the block, if Ctrl-C was pressed in it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if pressed:
            raise InterruptedSafelyError

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    except InterruptedSafelyError:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt
