"""The configurations in which kernels are shipped, compiled without a GPU.

Every kernel file lists its own in `shipped()`. `compile_for` builds one for a GPU generation with Triton's bundled
ptxas and reads from the machine code what decides its speed: registers, shared memory, spills, width of its loads.
It needs a process that was started without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 90)


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration. `signature`: Triton type of every argument in order ('*bf16', 'i32', 'fp32',
    'constexpr'); pointers, and integers named in `aligned`, are known to be multiples of 16. `spills`: allowed (0)."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: Sequence[str] = field(default_factory=tuple)
    wide_loads: bool = True
    targets: Sequence[int] = TARGETS

    @classmethod
    def of(
        cls, name: str, kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any], **options: Any
    ) -> Shipped:
        """From the types of the run-time arguments, which the constants follow in the order of the kernel's own list."""
        order = getattr(kernel, "arg_names", [*arguments, *constants])  # interpreted kernels have the names too
        signature = {n: "constexpr" if n in constants else arguments[n] for n in order}
        return cls(name, kernel, signature, constants, **options)


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a configuration. `spills`: loads and stores of local memory in the machine code; `shared`:
    bytes a block; `loads_128`: global loads of 16 bytes a thread, asynchronous copies included."""

    name: str
    kernel: str
    target: int
    registers: int
    shared: int
    stack: int
    spills: int
    loads_128: int
    num_warps: int


def all_shipped() -> list[Shipped]:
    """Every shipped configuration of every kernel file, by the files' names."""
    found: list[Shipped] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != Path(__file__).stem:
            module = importlib.import_module(f"regraft.kernels.{path.stem}")
            found += getattr(module, "shipped", list)()
    return found


def one_each(cases: Sequence[Shipped]) -> list[Shipped]:
    """The first configuration of every kernel for every target."""
    first: dict[tuple, Shipped] = {}
    for case in cases:
        first.setdefault((case.kernel.__name__, case.kernel.__module__, tuple(case.targets)), case)
    return list(first.values())


def compile_for(case: Shipped, target: int) -> Compiled:
    """Compile for sm_`target` and read the machine code. Raises RuntimeError under TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from regraft.kernels.lang import IS_INTERPRETED

    if IS_INTERPRETED:
        raise RuntimeError("compile in a process without TRITON_INTERPRET")
    names = list(case.signature)
    missing = [n for n, kind in case.signature.items() if (kind == "constexpr") != (n in case.constants)]
    if missing or names != list(case.kernel.arg_names):
        raise ValueError(f"{case.name}: signature {names} and constants do not fit {case.kernel.arg_names} ({missing})")
    aligned = [i for i, n in enumerate(names) if case.signature[n].startswith("*") or n in case.aligned]
    source = ASTSource(
        case.kernel,
        signature=dict(case.signature),
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, code = _disassemble(built.asm["cubin"])
    return Compiled(
        name=case.name,
        kernel=case.kernel.__name__,
        target=target,
        registers=_number(r"REG:(\d+)", usage),
        shared=int(built.metadata.shared),
        stack=_number(r"STACK:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads_128=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", code)),
        num_warps=case.num_warps,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = [
            subprocess.run([str(tool), flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
