"""The order in which modules are first called, for correspondence that names do not tell."""

from outlook_parity.core.recorder import Arrays, Recorder
from outlook_parity.core.request import Request
from outlook_parity.core.runner import Runner
from outlook_parity.mapping.structure import Order


class _Calls(Recorder):
    """The modules in the order of their first calls; nothing else is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.order: dict[str, int] = {}

    def enter(self, path: str, arrays: Arrays) -> Arrays | None:
        """See `Recorder`."""
        self.order.setdefault(path, len(self.order))
        return None

    def leave(self, arrays: Arrays, integers: Arrays | None = None) -> Arrays | None:
        """See `Recorder`."""
        return None


def call_order(torch: Runner, jax: Runner, request: Request) -> tuple[Order, Order]:
    """Return when each module is first called, in PyTorch and in JAX, by the names that they have there.

    Args:
        torch: PyTorch's runner.
        jax: JAX's, without names.
        request: of one forward pass. JAX traces it and computes nothing.
    """
    calls = _Calls()
    torch.watch(request, calls)
    return calls.order, {path: call for call, path in enumerate(jax.attributes(request))}
