"""Where the datasets of an HDF5 file lie, as JSON: run as a program of its own, for the HDF5 library may crash.

Imports nothing of this package: it starts in the time that h5py takes.
"""

import json
import sys
from typing import Any

MEMORY_BYTES = 2 << 30
SECONDS = 30


def limit() -> None:
    """Limit memory and processor time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def index(path: str, names: int, depth: int) -> list[dict[str, Any]]:
    """Return the datasets: name, dtype, shape, first byte, bytes.

    Raises:
        ValueError: there is something that no weights need: a link, filters, an external file.
    """
    import h5py

    found: list[dict[str, Any]] = []
    seen: set[int] = set()

    def visit(group: h5py.Group, above: str, left: int) -> None:
        if left == 0:
            raise ValueError(f"its groups nest more than {depth} deep")
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{above}{name} is a link")
            entry = group[name]
            address = h5py.h5o.get_info(entry.id).addr
            if address in seen or len(seen) >= names:
                raise ValueError(f"{above}{name} is there twice" if address in seen else f"more than {names} names")
            seen.add(address)
            if isinstance(entry, h5py.Group):
                visit(entry, f"{above}{name}/", left - 1)
            elif isinstance(entry, h5py.Dataset):
                found.append({"name": f"{above}{name}", **place(entry, f"{above}{name}")})

    with h5py.File(path, "r", locking=False) as file:
        weights = file.get("model_weights", getclass=True, getlink=False) if "model_weights" in file else None
        visit(file["model_weights"] if weights is h5py.Group else file, "", depth)
    return found


def place(dataset: Any, name: str) -> dict[str, Any]:
    """Return dtype, shape and place of a dataset that lies in the file in one piece."""
    import h5py

    plan = dataset.id.get_create_plist()
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_nfilters() or plan.get_external_count():
        raise ValueError(f"{name} does not lie in one piece in the file, as Keras writes weights")
    if dataset.shape is None:
        raise ValueError(f"{name} has no shape")
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype, logical=True)):
        raise ValueError(f"{name} holds numbers that NumPy keeps otherwise than the file")
    return {
        "dtype": dataset.dtype.str,
        "shape": list(dataset.shape),
        "offset": dataset.id.get_offset() or 0,  # None of an empty one
        "bytes": dataset.id.get_storage_size(),
    }


if __name__ == "__main__":
    limit()
    try:
        print(json.dumps({"found": index(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}))
    except Exception as error:
        print(json.dumps({"error": f"{error}".partition("\n")[0][:300] or type(error).__name__}))
