"""Prefetch tensors: a thread reads blocks while the caller writes earlier ones."""

from collections.abc import Iterable, Iterator, Mapping
from queue import Queue
from threading import Event, Semaphore, Thread

import numpy as np

from outlook_common.weights.io.lazy import LazyTensor

# Blocks in the queue; with those in use some 32 MB.
_QUEUE_BLOCKS = 6


def prefetch_blocks(tensors: Iterable[LazyTensor]) -> Iterator[np.ndarray]:
    """Yield the blocks of tensors in order, read by another thread up to `_QUEUE_BLOCKS` ahead.

    Raises:
        Exception: any error of reading.
    """
    queue: Queue[np.ndarray | BaseException | None] = Queue()
    slots, stopped = Semaphore(_QUEUE_BLOCKS), Event()

    def produce() -> None:
        try:
            for tensor in tensors:
                for block in tensor.blocks():
                    slots.acquire()
                    if stopped.is_set():
                        return
                    queue.put(block)
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (block := queue.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block
            slots.release()
    finally:
        stopped.set()
        for _ in range(_QUEUE_BLOCKS):
            slots.release()
        thread.join()


def prefetch_tensors(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor, Iterator[np.ndarray]]]:
    """Yield (name, tensor, its blocks) in order, read as `prefetch_blocks` does; all blocks must be consumed.

    Raises:
        Exception: any error of reading, at the latest after the last tensor: checksums follow the numbers.
    """
    blocks = prefetch_blocks(tensors.values())
    for name, tensor in tensors.items():
        yield name, tensor, _blocks_of(blocks, tensor)
    for _ in blocks:
        raise AssertionError("tensors have more bytes than their shapes, or not all were consumed")


def _blocks_of(blocks: Iterator[np.ndarray], tensor: LazyTensor) -> Iterator[np.ndarray]:
    left = tensor.nbytes
    while True:
        block = next(blocks)
        left -= len(block)
        yield block
        if left <= 0:
            assert left == 0, (tensor.dtype, tensor.shape, left)
            return
