"""What Triton's kernels compile to for a GPU that is not here: registers, spills, and the least time they can take.

    python -m benchmarks.triton_sass

The machine code (SASS) is read, not run. Each instruction is counted as often as its loop runs, and a kernel takes as
long as the busiest of: instructions, one for each scheduler and cycle; exponentials, reciprocals and single roundings
(MUFU, F2F, …), 16 threads for each multiprocessor and cycle; loads and stores, 128 bytes and 4 lines of L1 likewise;
the bytes of its tensors, each once, from and to memory. Latency, misses and the launch are left out: the numbers are
least times by count, no measurements.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from outlook_common.op_cases import BY_NAME
from outlook_torch.ops.triton.launch import Launch, backward, forward

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Gpu:
    """Peak rates: of the whole in seconds, of one multiprocessor in cycles."""

    name: str
    capability: int
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    schedulers: int = 4
    special_threads: int = 16  # of MUFU and what shares its unit
    l1_bytes: int = 128
    l1_lines: int = 4


H100 = Gpu("H100 SXM", 90, multiprocessors=132, hertz=1.755e9, bytes_per_second=3.35e12)

SPECIAL = ("MUFU", "F2F", "F2I", "I2F")  # one unit, 16 threads at a time
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of a load for each thread; else 4


@dataclass(frozen=True)
class Loop:
    """The instructions first … last jump back to the first."""

    first: int
    last: int


@dataclass(frozen=True)
class Sass:
    """A compiled kernel. Bytes of registers spilled are in `stack` and `local`, of shared memory in `shared`."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]
    ptx: str

    @property
    def spills(self) -> int:
        """Bytes of local memory, which hold what registers do not."""
        return self.stack + self.local

    @cached_property
    def opcodes(self) -> tuple[str, ...]:
        """What each instruction is, without predicate and operands: LDG.E.128, FFMA, …"""
        return tuple(re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in self.instructions)

    def count(self, trips: int) -> Counter[str]:
        """Count what one warp executes if loops, which are not nested here, run `trips` times."""
        inside = {at for loop in self.loops for at in range(loop.first, loop.last + 1)}
        counts: Counter[str] = Counter()
        for at, opcode in enumerate(self.opcodes):
            counts[opcode] += trips if at in inside else 1
        return counts


def compile_kernel(kernel: Any, arguments: dict[str, Any], capability: int) -> Sass:
    """Compile a kernel as Triton would for a launch with these arguments; tensors may be on the device "meta"."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg") if name in arguments}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(kernel.params):
        argument = arguments[parameter.name]
        if parameter.is_constexpr or argument is None or (isinstance(argument, int) and argument == 1):
            signature[parameter.name], constants[at,] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[parameter.name] = "*" + _dtype(argument)
            attributes[at,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if argument % 16 == 0:
                attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _disassembled(binary.asm["cubin"], binary.asm["ptx"])


def _dtype(x: torch.Tensor) -> str:
    return {"float": "fp", "bfloat": "bf"}[re.sub(r"\d", "", name := str(x.dtype).split(".")[1])] + re.sub(
        r"\D", "", name
    )


def _disassembled(cubin: bytes, ptx: str) -> Sass:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(file))
        listing = _tool("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    instructions, loops = _parsed(listing)
    registers, stack, shared, local = map(int, found.groups())
    return Sass(registers, stack, shared, local, instructions, loops, ptx)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _parsed(listing: str) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    # The last instruction of a kernel jumps to itself, and what stands behind it is padding.
    end = next(at for at, text in enumerate(instructions) if text.startswith("BRA") and _target(text, labels) == at)
    jumps = ((at, _target(text, labels)) for at, text in enumerate(instructions[:end]) if "BRA" in text)
    loops = tuple(Loop(to, at) for at, to in jumps if to is not None and to <= at)
    return tuple(instructions[:end]), loops


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    found = re.search(r"(\.L_x_\d+)", instruction)
    return labels.get(found[1]) if found else None


@dataclass(frozen=True)
class LeastTime:
    """The least seconds that one launch of a kernel takes, by what is busy."""

    instructions: float
    special: float
    l1: float
    memory: float

    @property
    def seconds(self) -> float:
        """Those of the busiest."""
        return max(self.instructions, self.special, self.l1, self.memory)


def least_time(sass: Sass, launch: Launch, gpu: Gpu) -> LeastTime:
    """Count a launch of an unrolled kernel, whose one loop, if any, is that over D."""
    arguments = launch.arguments
    counts = sass.count(trips=-(-arguments["D"] // (arguments["LANES"] * arguments["VECTOR"])))
    rows = 32 // arguments["LANES"]  # of a warp; what is one number for each row lies in as many lines
    special = l1 = 0
    for opcode, times in counts.items():
        name, *modifiers = opcode.split(".")
        if name in SPECIAL:
            special += times * 32 // gpu.special_threads
        if name in ("LDG", "STG"):
            size = 32 * next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4)
            lines = rows if size <= 128 else size // 128
            l1 += times * max(-(-size // gpu.l1_bytes), -(-lines // gpu.l1_lines))
    warps = launch.programs[0] * arguments["num_warps"]
    per_cycle = gpu.multiprocessors * gpu.hertz
    return LeastTime(
        instructions=warps * counts.total() / gpu.schedulers / per_cycle,
        special=warps * special / per_cycle,
        l1=warps * l1 / per_cycle,
        memory=_bytes(*arguments.values()) / gpu.bytes_per_second,
    )


def _bytes(*arguments: Any) -> int:
    return sum(x.numel() * x.element_size() for x in arguments if isinstance(x, torch.Tensor))


def launches(case: Any, dtype: torch.dtype, *, dropout: bool = False) -> tuple[Launch, ...]:
    """Return what the op launches forward and backward for a case, with its `value_shape`, `logits_shape`, `grid`."""
    value, out, cotangent, d_value = (torch.empty(case.value_shape, dtype=dtype, device="meta") for _ in range(4))
    logits, mask, d_logits = (torch.empty(case.logits_shape, dtype=dtype, device="meta") for _ in range(3))
    dropout_mask = mask if dropout else None
    return (
        *forward(value, logits, dropout_mask, out, case.grid),
        *backward(cotangent, value, logits, dropout_mask, d_value, d_logits, case.grid),
    )


def main() -> None:
    """Print the table."""
    print(f"# Triton's kernels on an {H100.name}: least microseconds\n")
    print(
        f"By instructions counted in SASS for sm_{H100.capability}; nothing was run. See `benchmarks/triton_sass.py`.\n"
    )
    costs = ("instructions", "special", "L1", "memory", "least", "floor")
    columns = ("case", "batch", "dtype", "kernel", "registers", "spilled", *costs)
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, dtype, batch in product(("volo_d1", "seed_512"), (torch.float32, torch.bfloat16), (8, 128)):
        case = BY_NAME[name].with_batch(batch)
        times: dict[str, list[LeastTime]] = {"forward": [], "backward": []}
        start = f"| {name} | {batch} | {str(dtype).removeprefix('torch.')} |"
        for at, launch in enumerate(launches(case, dtype)):
            sass = compile_kernel(launch.kernel, launch.arguments, H100.capability)
            time = least_time(sass, launch, H100)
            times["backward" if at else "forward"].append(time)
            parts = (time.instructions, time.special, time.l1, time.memory, time.seconds)
            shown = " | ".join(f"{1e6 * part:.1f}" for part in parts)
            print(f"{start} {launch.kernel.fn.__name__} | {sass.registers} | {sass.spills} | {shown} | |", flush=True)
        value, logits = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in (case.value_shape, case.logits_shape)
        )
        floors = {"forward": _bytes(value, logits, value), "backward": _bytes(value, logits, value, value, logits)}
        for way, floor in floors.items():
            least, fewest = sum(time.seconds for time in times[way]), floor / H100.bytes_per_second
            print(f"{start} **{way}** | | | | | | | {1e6 * least:.1f} | {least / fewest:.2f} × {1e6 * fewest:.1f} |")


if __name__ == "__main__":
    main()
