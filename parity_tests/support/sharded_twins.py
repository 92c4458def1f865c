"""Verify twins that several devices share, and print the reports as JSON: started by `test_sharded_twins.py`."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import outlook_jax
import outlook_torch
from outlook_parity import load_torch_weights, verify

DEVICES = 8
Spec = PartitionSpec
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

COLUMNS = Spec(None, "model")

# How the kernel and the batch were sharded when the twin was called module by module.
SEEN: list[str] = []
BATCHES: list[str] = []


class TorchTwin(torch.nn.Module):
    """A linear layer, and the mean over the batch taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return torch.tanh(y - y.mean(0, keepdim=True))


class Twin(nnx.Module):
    """Its twin; `centre` takes the mean off."""

    def __init__(self, centre: Callable[[jax.Array], jax.Array]) -> None:
        self.linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        self.centre = centre

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.linear.kernel.get_value()
        if not isinstance(kernel, jax.core.Tracer):
            SEEN.append(str(getattr(kernel.sharding, "spec", None)))
            BATCHES.append(str(getattr(x.sharding, "spec", None)))
        return jnp.tanh(self.centre(self.linear(x)))


def plainly(y: jax.Array) -> jax.Array:
    return y - y.mean(0, keepdims=True)


def constrained(y: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(plainly(y), NamedSharding(MESH, Spec("data")))


def mapped(y: jax.Array) -> jax.Array:
    def share(y: jax.Array) -> jax.Array:
        return y - jax.lax.pmean(y.mean(0, keepdims=True), "data")

    return jax.shard_map(share, mesh=MESH, in_specs=Spec("data"), out_specs=Spec("data"))(y)


def each_its_own(y: jax.Array) -> jax.Array:
    """Forget that the batch is shared: right on one device, wrong on several."""
    return jax.shard_map(plainly, mesh=MESH, in_specs=Spec("data"), out_specs=Spec("data"))(y)


def pair(centre: Callable[[jax.Array], jax.Array] = plainly) -> tuple[TorchTwin, Twin]:
    """Return both twins with the same weights, on one device."""
    torch_twin, twin = TorchTwin(), Twin(centre)
    twin.linear.kernel.set_value(jnp.asarray(torch_twin.linear.weight.detach().numpy().T))
    twin.linear.bias.set_value(jnp.asarray(torch_twin.linear.bias.detach().numpy()))
    return torch_twin, twin


def sharded(
    mesh: Mesh,
    kernel: Spec = COLUMNS,
    *,
    centre: Callable[[jax.Array], jax.Array] = plainly,
    other: Mesh | None = None,
) -> tuple[TorchTwin, Twin]:
    """Return both twins with JAX's on a mesh, its bias perhaps on another one."""
    torch_twin, twin = pair(centre)
    for parameter, on, spec in ((twin.linear.kernel, mesh, kernel), (twin.linear.bias, other or mesh, Spec())):
        parameter.set_value(jax.device_put(parameter.get_value(), NamedSharding(on, spec)))
    return torch_twin, twin


def layers(**options: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """Return this package's layers with the same weights."""
    torch_layer = outlook_torch.OutlookAttention(16, 2, **options)
    jax_layer = outlook_jax.OutlookAttention(16, 2, rngs=nnx.Rngs(0), **options)
    outlook_jax.load_weights(jax_layer, outlook_torch.export_weights(torch_layer))
    return torch_layer, jax_layer


def loaded() -> list[str]:
    """Return how kernels are sharded after PyTorch's weights were loaded: of an NNX module, and of a function."""
    torch_twin, twin = sharded(MESH)
    kernel = twin.linear.kernel.get_value()
    weights = {"linear": {"kernel": kernel, "bias": twin.linear.bias.get_value()}}
    torch_twin.linear.weight.data.add_(1)
    load_torch_weights(twin, torch_twin)
    _, new = load_torch_weights((lambda weights, x: x, weights), torch_twin)
    kernels = twin.linear.kernel.get_value(), new["linear"]["kernel"]
    assert all(np.array_equal(array, torch_twin.linear.weight.detach().numpy().T) for array in kernels)
    return [str(array.sharding.spec) for array in kernels]


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 6))
    maps = rng.standard_normal((8, 5, 4, 16))
    on_mesh = jax.device_put(x.astype(np.float32), NamedSharding(MESH, Spec(("data", "model"))))
    quickly: dict[str, Any] = {"dtypes": ["float64"], "steps": 2}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "weights on a mesh": (sharded(MESH), x, quickly),
        "weights on an explicit mesh": (sharded(EXPLICIT), x, quickly),
        "a batch that does not divide": (sharded(MESH), x[:3], quickly),
        "inputs on a mesh": (pair(), on_mesh, quickly),
        "a constraint inside": (pair(constrained), x, quickly),
        "shard_map inside": (pair(mapped), x, quickly),
        "shard_map inside, weights on its mesh": (sharded(MESH, Spec(), centre=mapped), x, quickly),
        "each device for itself": (pair(each_its_own), x, quickly | {"levels": ["forward", "training"]}),
        "two meshes": (sharded(MESH, other=EXPLICIT), x, quickly),
        "data": (layers(), maps, quickly | {"devices": DEVICES}),
        "fsdp": (layers(stride=2), maps, quickly | {"devices": DEVICES, "sharding": "fsdp"}),
        "data, watched": (pair(), x, quickly | {"devices": DEVICES}),
        "fsdp, watched": (pair(), x, quickly | {"devices": 2, "sharding": "fsdp"}),
        "a batch of 3 on 8": (layers(), maps[:3], quickly | {"devices": DEVICES}),
        "more devices than there are": (layers(), maps, quickly | {"devices": 2 * DEVICES}),
        "sharded, and devices": (sharded(MESH), x, quickly | {"devices": DEVICES}),
    }
    found: dict[str, Any] = {"loaded": loaded()}
    for name, ((torch_model, jax_model), inputs, options) in cases.items():
        SEEN.clear()
        BATCHES.clear()
        try:
            report = json.loads(verify(torch_model, jax_model, inputs, **options).to_json())
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        levels = sorted({check["level"] for check in report["checks"]})
        kept = {key: report[key] for key in ("verdict", "reason", "sharding", "notes")}
        differing = [check for check in report["checks"] if check["verdict"] == "mismatch"][:3]
        seen = {"seen": sorted(set(SEEN)), "batches": sorted(set(BATCHES))}
        found[name] = kept | seen | {"levels": levels, "differing": differing}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
