"""The configurations in which kernels are shipped, compiled without a GPU.

Every kernel file lists its own in `shipped()`. `compile_for` builds one for a GPU generation with Triton's bundled
ptxas and reads from the machine code what decides its speed: registers, shared memory, spills, width of its loads.
It needs a process that was started without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


def fingerprint(cases: Sequence[Shipped]) -> str:
    """Hash of what decides the machine code of these configurations: every Triton function (comments and layout aside), how
    each configuration is compiled."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list):
                digest.update(_code(ast.get_source_segment(text, node) or "").encode())
    for case in cases:
        constants = {name: str(value) for name, value in case.constants.items()}
        built = (case.name, dict(case.signature), constants, case.num_warps, case.num_stages, list(case.aligned))
        digest.update(repr(built).encode())
    return digest.hexdigest()


def _code(text: str) -> str:
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(token.string for token in tokens if token.type not in layout)


def one_each(cases: Sequence[Shipped]) -> list[Shipped]:
    """The first configuration of every kernel for every target."""
    first: dict[tuple, Shipped] = {}
    for case in cases:
        first.setdefault((case.kernel.__name__, case.kernel.__module__, tuple(case.targets)), case)
    return list(first.values())


def with_ones(case: Shipped) -> list[Shipped]:
    """The configuration with each of its integers at 1, which Triton then takes for a constant, and with all of them."""
    integers = [name for name, kind in case.signature.items() if kind in ("i32", "i64")]
    found = []
    for names in dict.fromkeys([*((name,) for name in integers), tuple(integers)]):
        signature = {n: "constexpr" if n in names else kind for n, kind in case.signature.items()}
        constants = {**case.constants, **dict.fromkeys(names, 1)}
        named = f"{case.name}, {', '.join(names)} 1"
        found += [replace(case, name=named, signature=signature, constants=constants)] if names else []
    return found


def parse_for(case: Shipped, target: int) -> None:
    """Take the configuration through Triton's front end alone, which finds what its arguments cannot be used for.

    Raises what that raises, and RuntimeError under TRITON_INTERPRET."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    source = _source(case)
    machine = GPUTarget("cuda", target, 32)
    backend = make_backend(machine)
    options = backend.parse_options({"num_warps": case.num_warps, "num_stages": case.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    source.make_ir(machine, options, codegen, backend.get_module_map(), context)


def compile_for(case: Shipped, target: int) -> Compiled:
    """Compile for sm_`target` and read the machine code. Raises RuntimeError under TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(case)
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


def _source(case: Shipped) -> Any:
    from triton.compiler import ASTSource

    from regraft.kernels.lang import IS_INTERPRETED

    if IS_INTERPRETED:
        raise RuntimeError("compile in a process without TRITON_INTERPRET")
    names = list(case.signature)
    missing = [n for n, kind in case.signature.items() if (kind == "constexpr") != (n in case.constants)]
    if missing or names != list(case.kernel.arg_names):
        raise ValueError(f"{case.name}: signature {names} and constants do not fit {case.kernel.arg_names} ({missing})")
    aligned = [n for n in names if case.signature[n].startswith("*") or n in case.aligned]
    return ASTSource(
        case.kernel,
        signature=dict(case.signature),
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in case.constants},
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
