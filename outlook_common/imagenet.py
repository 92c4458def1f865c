"""The names of ImageNet-1k's classes: WordNet 3.0's words for its synsets (Copyright 2006 by Princeton University)."""

from functools import cache
from importlib.resources import files

IMAGENET_CLASSES = 1000


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the name of every class of ImageNet-1k, in the order of the models' outputs."""
    names = (files("outlook_common") / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == IMAGENET_CLASSES
    return tuple(names)


def class_name(index: int, num_classes: int) -> str:
    """Return what a class is called: ImageNet's name where there are as many classes, else "class 17".

    Raises:
        ValueError: there is no such class.
    """
    if not 0 <= index < num_classes:
        raise ValueError(f"class {index} of {num_classes}: expected 0 to {num_classes - 1}")
    return imagenet_names()[index] if num_classes == IMAGENET_CLASSES else f"class {index}"
