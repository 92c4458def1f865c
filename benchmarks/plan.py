"""Memory and communication of a training step on many devices, by arithmetic from configuration and logical axes.

Counted are bytes per device: what stands in memory for the whole step, and what each device sends, by the ring or tree
algorithms whose cost all vendors publish: (n - 1) / n of the array for an all-gather or a reduce-scatter over n
devices, twice that for an all-reduce.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from outlook_common.axes import mesh_axes
from outlook_common.config import STEM_STRIDE, VOLOConfig, volo_config
from outlook_common.weights.tables.base import Entry
from outlook_common.weights.tables.volo import volo_table

FLOAT32, BFLOAT16 = 4, 2
# Parameters, gradients, and Adam's two moments.
_HELD = 4


@dataclass(frozen=True)
class Link:
    """What connects the devices along an axis of the mesh: bytes per second that each can send, as published."""

    name: str
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Devices, and what their makers publish of one.

    Attributes:
        name: of the machine.
        mesh: axis -> devices along it; the batch lies along all of them.
        links: axis -> what connects devices along it.
        memory: bytes.
        peak: multiplications and additions in bfloat16 per second.
    """

    name: str
    mesh: Mapping[str, int]
    links: Mapping[str, Link]
    memory: float
    peak: float

    @property
    def devices(self) -> int:
        """How many there are."""
        return prod(self.mesh.values())


# Cloud TPU documentation, v5e: 1,600 Gbps of inter-chip interconnect per chip, a torus: the same for every axis.
_ICI = Link("ICI, 1,600 Gb/s", 1600e9 / 8)
# NVIDIA H100 SXM and DGX H100: NVLink 900 GB/s both ways together; one 400 Gb/s InfiniBand port per GPU.
_NVLINK, _INFINIBAND = Link("NVLink, 450 GB/s", 450e9), Link("InfiniBand, 400 Gb/s", 400e9 / 8)
V5E_256 = Machine("v5e-256", {"replica": 4, "data": 64}, {"replica": _ICI, "data": _ICI}, 16e9, 197e12)
H100_64 = Machine("64 H100", {"replica": 8, "data": 8}, {"replica": _INFINIBAND, "data": _NVLINK}, 80e9, 989e12)


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's parameters, by whether the rules split them.

    Attributes:
        split: in parameters that are split along the axis `data` of the mesh.
        whole: in parameters that every device has whole.
    """

    split: int
    whole: int

    @property
    def total(self) -> int:
        """All."""
        return self.split + self.whole


def parameters(config: VOLOConfig, mesh: Mapping[str, int], rules: str) -> Parameters:
    """Count the parameters by the axes of the table; BatchNorm's statistics are none."""
    entries = [entry for entry in volo_table(config).entries if _is_parameter(entry)]
    on = mesh_axes(entries, mesh, rules)
    split = sum(prod(entry.shape) for entry in entries if any(on[entry.torch]))
    return Parameters(split, sum(prod(entry.shape) for entry in entries) - split)


def _is_parameter(entry: Entry) -> bool:
    return not entry.torch.endswith(("running_mean", "running_var", "num_batches_tracked"))


def held(counted: Parameters, shards: int) -> float:
    """Return the bytes per device of parameters, gradients and moments in float32."""
    return _HELD * FLOAT32 * (counted.split / shards + counted.whole)


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends in a step, by collective.

    Attributes:
        all_gather: of weights along `data`, once, by `outlook_jax.gather_weights`; FSDP2 of PyTorch gathers them twice.
        reduce_scatter: of gradients along `data`.
        all_reduce: of gradients of whole parameters along `data`.
        between: all-reduce along `replica` of each device's part of all gradients.
    """

    all_gather: float
    reduce_scatter: float
    all_reduce: float
    between: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.between

    def seconds(self, machine: Machine) -> float:
        """Return how long the links take at their published bandwidth, nothing hidden behind computing."""
        along = self.all_gather + self.reduce_scatter + self.all_reduce
        return along / machine.links["data"].bandwidth + self.between / machine.links["replica"].bandwidth


def sent(counted: Parameters, mesh: Mapping[str, int]) -> Sent:
    """Return what a step sends, all in float32."""
    shards, replicas = mesh["data"], mesh.get("replica", 1)
    share, other = (shards - 1) / shards, (replicas - 1) / replicas
    return Sent(
        share * counted.split * FLOAT32,
        share * counted.split * FLOAT32,
        2 * share * counted.whole * FLOAT32,
        2 * other * counted.total / shards * FLOAT32,
    )


@dataclass(frozen=True)
class Work:
    """Of one image.

    Attributes:
        multiplications: with additions, in a forward pass.
        kept: numbers kept for the backward pass: inputs of blocks and results of products with weights and of
            attentions, as `outlook_jax.scan` keeps them; of the stem what BatchNorm and ReLU need.
    """

    multiplications: int
    kept: int


def work(config: VOLOConfig) -> Work:
    """Count the products and the kept numbers of one image."""
    parts = list(_work(config))
    return Work(sum(part.multiplications for part in parts), sum(part.kept for part in parts))


def _work(config: VOLOConfig) -> Iterator[Work]:
    pixels, hidden = prod(config.img_size), config.stem_hidden_dim
    at_stem = pixels // STEM_STRIDE**2
    for channels, kernel in ((config.in_chans, 7), (hidden, 3), (hidden, 3)):
        yield Work(at_stem * hidden * channels * kernel**2, 2 * at_stem * hidden)
    places = pixels // config.patch_size**2
    yield Work(at_stem * hidden * config.embed_dims[0], places * config.embed_dims[0])
    for part in config.network:
        dim = config.embed_dims[part.stage]
        if part.kind == "downsample":
            following = config.embed_dims[part.stage + 1]
            yield Work(places * dim * following, places // 4 * following)
            places //= 4
            continue
        mlp = int(dim * config.mlp_ratio[part.stage])
        for _ in range(config.layers[part.stage]):
            if part.kind == "outlooker":
                window = prod(config.out_kernel)
                windows = places // prod(config.out_stride)
                logits = windows * config.num_heads[part.stage] * window**2
                attention = Work(windows * window**2 * dim, logits + 2 * places * dim)
                products = 2 * places * dim**2 + logits * dim
            else:
                attention = Work(2 * places**2 * dim, 4 * places * dim)
                products = 4 * places * dim**2
            products += 2 * places * dim * mlp
            # Of every block: its input, the projection, both layers of the MLP.
            yield Work(products + attention.multiplications, attention.kept + places * (3 * dim + mlp))
    dim, tokens = config.num_features, places + 1
    for _ in config.post_layers or ():
        yield Work(2 * tokens * dim**2 + 2 * tokens * dim, 3 * tokens * dim)
    yield Work(tokens * dim * config.num_classes, tokens * config.num_classes)


@dataclass(frozen=True)
class Plan:
    """A training step of one model on one machine; bytes and seconds per device.

    Attributes:
        parameters: their number.
        held: of parameters, gradients and moments.
        gathered: of whole weights in float32, in place of the split ones, while the step computes.
        activations: kept for the backward pass, in bfloat16.
        sent: by collective.
        communication: seconds at the published bandwidths.
        computing: seconds at the published peak, three forward passes.
    """

    parameters: int
    held: float
    gathered: float
    activations: float
    sent: Sent
    communication: float
    computing: float


def plan(config: VOLOConfig, machine: Machine, *, rules: str, batch: int) -> Plan:
    """Return the plan of a training step.

    Args:
        config: of the model.
        machine: where it runs; the rules "fsdp" split weights along `data` and repeat them along `replica`.
        rules: "data" or "fsdp".
        batch: images on all devices together.

    Raises:
        ValueError: the mesh does not divide the parameters, or the devices do not divide the batch.
    """
    if batch % machine.devices:
        raise ValueError(f"{machine.name}: {machine.devices} devices do not divide a batch of {batch}")
    counted, of_image = parameters(config, machine.mesh, rules), work(config)
    images = batch // machine.devices
    traffic = sent(counted, machine.mesh)
    return Plan(
        counted.total,
        held(counted, machine.mesh["data"]),
        counted.split * FLOAT32,
        images * of_image.kept * BFLOAT16,
        traffic,
        traffic.seconds(machine),
        images * 3 * 2 * of_image.multiplications / machine.peak,
    )


def plans(batch: int = 1024, size: int = 224) -> dict[str, dict[str, tuple[Plan, Plan]]]:
    """Return machine -> d1 to d5 -> plans by the rules "data" and "fsdp", for images of so many pixels a side."""
    return {
        machine.name: {
            name: (plan(config, machine, rules="data", batch=batch), plan(config, machine, rules="fsdp", batch=batch))
            for name in ("d1", "d2", "d3", "d4", "d5")
            for config in [volo_config(f"volo_{name}_224", img_size=size)]
        }
        for machine in (V5E_256, H100_64)
    }
