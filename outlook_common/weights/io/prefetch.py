"""Read ahead: one thread produces what the other consumes, so that reading and writing take turns on no one's time."""

from collections.abc import Iterable, Iterator, Mapping
from queue import Queue
from threading import Event, Semaphore, Thread

import numpy as np

from outlook_common.weights.io.lazy import LazyTensor

# How many blocks may wait: with what each side holds, some 32 MB.
_WAITING = 6


def blocks_ahead(tensors: Iterable[LazyTensor]) -> Iterator[np.ndarray]:
    """Yield the blocks of tensors one after another; another thread reads them a little ahead.

    Raises:
        Exception: whatever reading raises.
    """
    queue: Queue[np.ndarray | BaseException | None] = Queue()
    places, stopped = Semaphore(_WAITING), Event()

    def produce() -> None:
        try:
            for tensor in tensors:
                for block in tensor.blocks():
                    places.acquire()
                    if stopped.is_set():
                        return
                    queue.put(block)
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = Thread(target=produce, name="read ahead", daemon=True)
    thread.start()
    try:
        while (block := queue.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block
            places.release()
    finally:
        stopped.set()
        for _ in range(_WAITING):
            places.release()
        thread.join()


def each_ahead(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor, Iterator[np.ndarray]]]:
    """Yield (name, tensor, its blocks) one after another, read as `blocks_ahead` does; all blocks must be taken.

    Raises:
        Exception: whatever reading raises, at the latest after the last tensor: checksums come behind the numbers.
    """
    blocks = blocks_ahead(tensors.values())
    for name, tensor in tensors.items():
        yield name, tensor, _of_one(blocks, tensor)
    for _ in blocks:
        raise AssertionError("tensors have more bytes than their shapes, or not all were taken")


def _of_one(blocks: Iterator[np.ndarray], tensor: LazyTensor) -> Iterator[np.ndarray]:
    left = tensor.nbytes
    while True:
        block = next(blocks)
        left -= len(block)
        yield block
        if left <= 0:
            assert left == 0, (tensor.dtype, tensor.shape, left)
            return
