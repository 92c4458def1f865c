"""Class names of ImageNet-1k: WordNet 3.0's lemmas of its synsets (Copyright 2006 by Princeton University)."""

from functools import cache
from importlib.resources import files

IMAGENET_CLASSES = 1000


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the names of all 1000 classes, in the order of the models' outputs."""
    names = (files("outlook_common") / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == IMAGENET_CLASSES
    return tuple(names)


def class_name(index: int, num_classes: int) -> str:
    """Return the ImageNet name of a class if `num_classes` is 1000, else "class <index>".

    Raises:
        ValueError: `index` is out of range.
    """
    if not 0 <= index < num_classes:
        raise ValueError(f"class {index} of {num_classes}: expected 0 to {num_classes - 1}")
    return imagenet_names()[index] if num_classes == IMAGENET_CLASSES else f"class {index}"
