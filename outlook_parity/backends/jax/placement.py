"""Where a JAX twin runs: on one device, or on a mesh, sharded as it was given or by rules."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from outlook_parity.backends.jax.base import JaxModel
from outlook_parity.backends.jax.settings import jax_device
from outlook_parity.core.request import Inputs
from outlook_parity.core.sharding import AS_GIVEN, Sharding, ShardingRequest
from outlook_parity.models.registry import known_model

AXIS = "data"  # of the mesh that rules are for

WHOLE = PartitionSpec()  # type: ignore[no-untyped-call]

NOTHING = ShardingRequest()


@dataclass(frozen=True)
class Placement:
    """Where the arrays of a JAX twin lie.

    Attributes:
        mesh: None for one device.
        rules: a key of `RULES`; None leaves weights as they are sharded.
        inputs: the specs of inputs that came sharded.
        weights: those of the weights of this package's own models, by the table of `outlook_jax.partition_specs`.
    """

    mesh: Mesh | None = None
    rules: str | None = None
    inputs: Mapping[str, PartitionSpec] = field(default_factory=dict)
    weights: Mapping[str, PartitionSpec] = field(default_factory=dict)

    def on(self, device: str) -> "Place":
        """Return where arrays go in a run on this kind of device.

        Raises:
            ValueError: there are fewer such devices than the mesh has.
        """
        first = jax_device(device)
        if self.mesh is None or self.mesh.devices.flat[0].platform == first.platform:
            return Place(first, self.mesh, self)
        return Place(first, _same_mesh_of(jax.devices(device), self.mesh, device), self)

    def input_spec(self, name: str, shape: Sequence[int]) -> PartitionSpec:
        """Return the spec of an input: its own, else the batch along the mesh's first axis, if that divides it."""
        assert self.mesh is not None
        if (given := self.inputs.get(name)) is not None:
            return given if divides(self.mesh, given, shape) else WHOLE
        first = PartitionSpec(self.mesh.axis_names[0])  # type: ignore[no-untyped-call]
        return first if shape and divides(self.mesh, first, shape) else WHOLE

    def weight_spec(self, name: str, value: Any) -> PartitionSpec:
        """Return the spec of a weight or buffer: by the rules, else its own; of what lies on one device, none."""
        assert self.mesh is not None
        if name in self.weights:
            return self.weights[name]
        if self.rules is not None:
            return longest_axis(value.shape, self.mesh.size) if self.rules == "fsdp" else WHOLE
        sharding = getattr(value, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else WHOLE

    def describe(self, model: JaxModel, inputs: Inputs) -> Sharding | None:
        """Return what the report says, None on one device."""
        if self.mesh is None:
            return None
        values = model.parameters | model.buffers
        specs = [self.weight_spec(name, value) for name, value in values.items()]
        split = [not NamedSharding(self.mesh, spec).is_fully_replicated for spec in specs]
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return Sharding(
            mesh=dict(self.mesh.shape),
            axis_types={name: kind.name.lower() for name, kind in types},
            rules=self.rules or AS_GIVEN,
            weights=len(values),
            split=sum(split),
            inputs={name: str(self.input_spec(name, array.shape)) for name, array in inputs.items()},
        )


@dataclass(frozen=True)
class Place:
    """Where arrays go in one run.

    Attributes:
        device: the default device; what lies there is committed to it nowhere, so that a twin may itself move it on to
            several.
        mesh: None for one device.
    """

    device: jax.Device
    mesh: Mesh | None
    _placement: Placement

    def weight(self, name: str, array: Any, given: Any) -> jax.Array:
        """Place a weight or buffer, `given` being the user's own."""
        return self._put(array, None if self.mesh is None else self._placement.weight_spec(name, given))

    def input(self, name: str, array: np.ndarray) -> jax.Array:
        """Place an input."""
        return self._put(array, None if self.mesh is None else self._placement.input_spec(name, array.shape))

    def other(self, array: Any) -> jax.Array:
        """Place an array of the verifier's own, which every device needs."""
        return self._put(array, None)

    def _put(self, array: Any, spec: PartitionSpec | None) -> jax.Array:
        if self.mesh is not None and spec is not None:
            return jax.device_put(array, NamedSharding(self.mesh, spec))
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):  # they are no NumPy arrays
            data = jax.device_put(np.asarray(jax.random.key_data(array)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        return jax.device_put(np.asarray(array))


def placement_of(model: JaxModel, request: ShardingRequest = NOTHING) -> Placement:
    """Return where a twin runs: on the mesh that its weights and inputs are sharded over, if any, or as requested.

    Raises:
        ValueError: the twin cannot run sharded as it is given; or rules are asked for of a twin that is sharded, or do
            not divide the batch.
    """
    inputs, devices = request.inputs, request.devices
    given = {f"weight {name}": value for kind in (model.parameters, model.buffers) for name, value in kind.items()}
    sharded = {name: one.sharding for name, one in (given | dict(inputs)).items() if _is_sharded(one)}
    mesh = _mesh_of(sharded)
    if devices is None:
        specs = {name: one.sharding.spec for name, one in inputs.items() if name in sharded}
        return Placement(mesh or _ambient_mesh(), None, specs)
    if mesh is not None:
        raise ValueError(
            f"devices={devices} is for a JAX twin on one device; this one has {len(sharded)} arrays sharded over the "
            f"mesh {_shown(mesh)}: leave devices out, and it runs as it is"
        )
    for name, one in inputs.items():
        batch = np.shape(one)[:1]
        if not batch or batch[0] % devices:
            raise ValueError(
                f"{name} has a batch of {batch[0] if batch else 'no axis'}, which {devices} devices do not divide; "
                f"a batch of {devices * max(1, -(-(batch or (1,))[0] // devices))} would do"
            )
    known = known_model(getattr(model, "module", None))
    axes = {} if known is None else known.mesh_axes({AXIS: devices}, request.rules)
    make: Any = PartitionSpec
    return Placement(
        Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,), axis_types=(AxisType.Auto,)),
        request.rules,
        weights={name: make(*one) for name, one in axes.items()},
    )


def make_cpu_devices(count: int) -> None:
    """Let JAX take the CPU for so many devices; without effect once it is in use."""
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]


def few_devices(device: str, devices: int | None) -> str | None:
    """Return why there are not as many devices, None if there are, or if one will do."""
    if devices is None:
        return None
    for kind in dict.fromkeys(("cpu", device)):  # float64 runs on the CPU
        if (found := len(jax.devices(kind))) < devices:
            remedy = f'; jax.config.update("jax_num_cpu_devices", {devices}) before JAX is first used makes them'
            return f"JAX has {found} of {devices} {kind} devices{remedy if kind == 'cpu' else ''}"
    return None


def longest_axis(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Return the spec that splits the longest axis that the devices divide; none if they divide none."""
    fitting = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if not fitting:
        return WHOLE
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, AXIS)  # type: ignore[no-untyped-call]


def divides(mesh: Mesh, spec: PartitionSpec, shape: Sequence[int]) -> bool:
    """Whether an array of this shape can be sharded so."""
    try:
        NamedSharding(mesh, spec).shard_shape(tuple(shape))
    except ValueError:
        return False
    return True


def _is_sharded(value: Any) -> bool:
    return isinstance(value, jax.Array) and len(value.sharding.device_set) > 1


def _mesh_of(shardings: Mapping[str, Any]) -> Mesh | None:
    """Return the one mesh of all shardings, None if there are none.

    Raises:
        ValueError: there are others than of one mesh, or of more than this process.
    """
    meshes: dict[Mesh, str] = {}
    for name, sharding in shardings.items():
        if not sharding.is_fully_addressable:
            raise ValueError(
                f"{name} is spread over {len(sharding.device_set)} devices of {jax.process_count()} processes; verify "
                "runs in one process: verify the same model on several devices of it (devices=N)"
            )
        if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)):
            raise ValueError(
                f"{name} is sharded by a {type(sharding).__name__}, which verify cannot place anew; place the twin by "
                "jax.sharding.NamedSharding"
            )
        meshes.setdefault(sharding.mesh, name)
    if len(meshes) > 1:
        (one, first), (other, second), *_ = meshes.items()
        raise ValueError(
            f"the JAX twin is sharded over {len(meshes)} meshes, {_shown(one)} of {first} and {_shown(other)} of "
            f"{second}: verify runs twins on one mesh"
        )
    return next(iter(meshes), None)


def _ambient_mesh() -> Mesh | None:
    """Return the mesh of `jax.set_mesh`, None if there is none or it is of one device."""
    mesh = jax.sharding.get_mesh()
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _same_mesh_of(devices: Sequence[jax.Device], mesh: Mesh, kind: str) -> Mesh:
    if len(devices) < mesh.size:
        raise ValueError(
            f"the JAX twin is sharded over the mesh {_shown(mesh)} of {mesh.devices.flat[0].platform} devices, and "
            f"part of the runs are on {kind} (float64 always is on the CPU), where JAX has {len(devices)} of "
            f'{mesh.size}; for the CPU jax.config.update("jax_num_cpu_devices", {mesh.size}) before JAX is first used'
        )
    chosen = np.array(devices[: mesh.size]).reshape(mesh.devices.shape)
    return Mesh(chosen, mesh.axis_names, axis_types=mesh.axis_types)


def _shown(mesh: Mesh) -> str:
    types = {kind.name.lower() for kind in mesh.axis_types}
    return f"({', '.join(f'{name}={size}' for name, size in mesh.shape.items())}; {' and '.join(sorted(types))})"
