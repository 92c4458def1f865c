"""What Triton's kernels compile to for a GPU that is not here: registers, spills, and a bound on their time.

    python -m benchmarks.triton_sass            the op's kernels for the H100, as a table
    python -m benchmarks.triton_sass --capability 80 --case volo_d1 --dtype bfloat16

The machine code (SASS) is read, not run. Each instruction is counted as often as its loop runs, and a kernel takes as
long as the busiest of: its instructions at one per scheduler and cycle, its MUFU (exponentials, reciprocals) at 16
threads, its loads and stores at 128 bytes of L1 and 4 cache lines, per multiprocessor and cycle, and the bytes of its
tensors from and to memory. Latency, caches that miss, and the launch itself are left out: these are bounds, no times.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from outlook_torch.ops.triton.launch import Launch, backward, forward

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Gpu:
    """Peak rates; units are those of the names."""

    multiprocessors: int
    hertz: float
    bytes_per_second: float
    schedulers: int = 4
    mufu_threads: int = 16
    l1_bytes: int = 128
    l1_lines: int = 4


H100 = Gpu(multiprocessors=132, hertz=1.755e9, bytes_per_second=3.35e12)


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

    def count(self, trips: int = 1) -> Counter[str]:
        """Count what one warp executes if loops, which are not nested here, run `trips` times."""
        inside = {at for loop in self.loops for at in range(loop.first, loop.last + 1)}
        counts: Counter[str] = Counter()
        for at, opcode in enumerate(self.opcodes):
            counts[opcode] += trips if at in inside else 1
        return counts


def compile_kernel(kernel: Any, arguments: dict[str, Any], capability: int) -> Sass:
    """Compile a kernel as Triton would for a launch with these arguments; tensors may be on the device "meta"."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
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
    return Sass(*map(int, found.groups()), instructions, loops, ptx)


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


def launches(case: Any, dtype: torch.dtype, *, dropout: bool = False) -> tuple[Launch, ...]:
    """Return what the op launches forward and backward for a case, with its `value_shape`, `logits_shape`, `grid`."""
    value, out, cotangent, d_value = (torch.empty(case.value_shape, dtype=dtype, device="meta") for _ in range(4))
    logits, mask, d_logits = (torch.empty(case.logits_shape, dtype=dtype, device="meta") for _ in range(3))
    dropout_mask = mask if dropout else None
    return (
        *forward(value, logits, dropout_mask, out, case.grid),
        *backward(cotangent, value, logits, dropout_mask, d_value, d_logits, case.grid),
    )
