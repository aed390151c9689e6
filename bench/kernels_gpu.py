"""Every kernel forward and backward on a GPU, beside eager torch, torch.compile, aten's attention and Liger.

Milliseconds (median, 20 and 80 percent; `gpu_timing`), bytes or FLOPs a second, and their share of the copy rate or the
matrix rate measured in the same run. torch.compile comes last, for it takes seconds a case: everything else is measured
by then, and what there was no time for is named. The result is written after every case. Needs torch and Triton; Liger
where it is installed. `--device cpu` only shows that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
from gpu_timing import copies_for, own_stream, timed
from kernels_adapters import adapter_cases
from kernels_heads import head_cases

RESULT = Path(__file__).resolve().parent / "results" / "kernels_gpu.json"


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `forms`: contestant -> function of the inputs. Work: bytes, or FLOPs for a product."""

    name: str
    shape: str
    inputs: Sequence[Tensor]
    forms: dict[str, Callable[..., Tensor]]
    forward_work: float
    backward_work: float
    unit: str = "bytes"
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measurement. `rate`: bytes or FLOPs a second; `share`: of the ceiling of its unit; `timer`: see `Timing`."""

    name: str
    shape: str
    direction: str
    who: str
    milliseconds: float
    low: float
    high: float
    rate: float
    unit: str
    share: float
    timer: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="names of kernels that contain this")
    parser.add_argument("--seconds", type=float, default=140.0, help="start no further case after this (%(default)s)")
    parser.add_argument(
        "--hand-over",
        action="store_true",
        help="fill the table that says whose attention runs, nothing else",
    )
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/kernels_gpu.json on a GPU")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu runs tiny shapes to see that it works")
    if options.hand_over:
        measure_hand_over(options)
        return
    out = options.out or (RESULT if options.device != "cpu" and not options.only else None)
    rows, skipped = measure_cases(options, out)
    for line in table(rows):
        print(line)
    for line in skipped:
        print(f"not measured: {line}")
    if not rows:
        sys.exit("nothing was measured")


def measure_cases(options: argparse.Namespace, out: Path | None) -> tuple[list[Row], list[str]]:
    """The rows, and what was not measured with the reason; all that there is goes to `out` after every case."""
    began = time.perf_counter()
    ceilings = measure_ceilings(options.device)
    print(f"copy {ceilings['bytes'] / 1e12:.2f} TB/s, bf16 product {ceilings['FLOPs'] / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[Row] = []
    skipped: list[str] = []
    result = {
        "name": "kernels_gpu",
        "command": "python bench/kernels_gpu.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.facts(),
        "versions": {"torch": torch.__version__, "triton": triton_version()},
        "ceilings": ceilings,
    }
    for compiled in (False, True):
        for make in cases(options.device):
            name = " ".join([make.func.__name__, *(str(x) for x in make.args if isinstance(x, int))])
            try:
                case = make()
                name = f"{case.name} {case.shape}"
                if options.only in case.name:
                    late = time.perf_counter() - began > options.seconds
                    measure_case(case, compiled, late, ceilings, options.device, rows, skipped)
            except Exception as error:  # a case that fails costs no other one's figures
                skipped.append(f"{name}: {told(error)}")
            if out is not None:
                whole = {**result, "rows": [asdict(row) for row in rows], "not measured": skipped}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return rows, skipped


def measure_case(
    case: Case, compiled: bool, late: bool, ceilings: dict[str, float], device: str, rows: list[Row], skipped: list[str]
) -> None:
    """Add the case's rows, of torch.compile or of all others; each contestant's failure is its own."""
    for who, form in case.forms.items():
        if (who == "compile") != compiled:
            continue
        if late or (compiled and device == "cpu"):
            skipped.append(f"{case.name} {case.shape} {who}: {'no time left' if late else 'on cpu'}")
            continue
        try:
            rows += measure(case, who, form, ceilings, device)
        except Exception as error:
            skipped.append(f"{case.name} {case.shape} {who}: {told(error)}")


def told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def measure_ceilings(device: str) -> dict[str, float]:
    """Bytes a second of a large copy, read and written counted; FLOPs a second of an 8192-cube bf16 product."""
    size, side = (1 << 30, 8192) if device != "cpu" else (1 << 22, 128)
    with own_stream(device) as stream:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = timed([lambda: target.copy_(source)], device, stream).median
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = timed([lambda: a @ b], device, stream).median
    return {"bytes": 2 * size / copied * 1e3, "FLOPs": 2 * side**3 / product * 1e3}


def measure(case: Case, who: str, form: Callable, ceilings: dict[str, float], device: str) -> list[Row]:
    from regraft.kernels.choice import forced

    setting = {"regraft": "triton" if device != "cpu" else "reference", "regraft as chosen": "auto"}.get(who, "auto")
    inputs_take = sum(x.numel() * x.element_size() for x in case.inputs)
    copies = copies_for(case.forward_work if case.unit == "bytes" else inputs_take, device)
    if who == "compile":
        form = compiled_for_this_shape(form)
    found = []
    with forced(setting), own_stream(device) as stream:
        sets = [case.inputs, *([copied(x) for x in case.inputs] for _ in range(copies - 1))]
        with torch.no_grad():
            forward = timed([partial(form, *inputs) for inputs in sets], device, stream)
        found.append(("forward", forward, case.forward_work))
        if any(x.requires_grad for x in case.inputs):
            backwards = [backward_of(form, inputs) for inputs in sets]
            found.append(("backward", timed(backwards, device, stream), case.backward_work))
    rows = []
    for direction, t, work in found:
        rate = work / t.median * 1e3
        share = rate / ceilings[case.unit]
        times = (t.median, t.low, t.high)
        rows.append(Row(case.name, case.shape, direction, who, *times, rate, case.unit, share, t.timer))
    return rows


def compiled_for_this_shape(form: Callable) -> Callable:
    """By torch.compile for the very shape: what it compiled for another would make it try one kernel for all shapes."""
    torch._dynamo.reset()
    # Our backward keeps its graph for the next call, which buffers that it may overwrite forbid.
    torch._functorch.config.donated_buffer = False
    return torch.compile(form, dynamic=False)


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def backward_of(form: Callable, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Forward once, and a function that goes backward from there."""
    out = form(*inputs)
    upstream = torch.randn_like(out)
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def cases(device: str) -> Iterator[partial[Case]]:
    """BERT-base and -large shapes, each made when it is called; on CPU one tiny shape of each."""
    shapes = [(16384, 768), (16384, 1024), (4096, 768)] if device != "cpu" else [(8, 64)]
    for tokens, width in shapes:
        yield partial(norm_case, tokens, width, device)
        yield partial(gelu_case, tokens, 4 * width, device)
        yield partial(geglu_case, tokens, 4 * width, device)
        yield partial(embedding_case, tokens, width, device)
    sizes = [(64, 512, 32), (64, 128, 128), (128, 512, 32), (64, 64, 256)] if device != "cpu" else [(32, 16, 2)]
    for p in (0.0, 0.1):
        for size, length, sequences in sizes:
            yield partial(attention_case, size, length, sequences, p, device)
    for side in (-1, 64) if device != "cpu" else (4,):  # ModernBERT's two kinds of layer
        length, sequences = (1024, 16) if device != "cpu" else (16, 2)
        yield partial(attention_case, 64, length, sequences, 0.0, device, True, side)

    yield from head_cases(device, Case, leaf)
    yield from adapter_cases(device, Case, leaf)


def leaf(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def norm_case(tokens: int, width: int, device: str) -> Case:
    from regraft.kernels.norm import dropout_add_layer_norm
    from regraft.kernels.philox import make_seed

    seed = make_seed(1, device)
    ours = lambda x, r, w, b: dropout_add_layer_norm(x, r, w, b, p=0.1, seed=seed)  # noqa: E731
    functional = torch.nn.functional
    eager = lambda x, r, w, b: functional.layer_norm(functional.dropout(x, 0.1) + r, (width,), w, b, 1e-12)  # noqa: E731
    forms = {"regraft": ours, "eager": eager, "compile": eager}
    try:
        from liger_kernel.transformers.functional import liger_layer_norm

        forms["liger, no dropout"] = lambda x, r, w, b: liger_layer_norm(x + r, w, b, 1e-12)
    except ImportError:
        pass
    inputs = [leaf(tokens, width, device=device) for _ in range(2)]
    inputs += [leaf(width, device=device) for _ in range(2)]
    moved = tokens * width * 2
    return Case("dropout + residual + LayerNorm", f"{tokens} x {width}", inputs, forms, 3 * moved, 5 * moved)


def gelu_case(tokens: int, width: int, device: str) -> Case:
    from regraft.kernels.gelu import bias_gelu

    eager = lambda x, b: torch.nn.functional.gelu(x + b)  # noqa: E731
    forms = {"regraft": bias_gelu, "eager": eager, "compile": eager}
    moved = tokens * width * 2
    inputs = [leaf(tokens, width, device=device), leaf(width, device=device)]
    return Case("bias + GELU", f"{tokens} x {width}", inputs, forms, 2 * moved, 3 * moved)


def geglu_case(tokens: int, width: int, device: str) -> Case:
    """x [tokens, 2 width]: the second half gates the first's GELU."""
    from regraft.kernels.gelu import bias_geglu

    def eager(x: Tensor, b: Tensor) -> Tensor:
        value, gate = (x + b).chunk(2, dim=-1)
        return torch.nn.functional.gelu(value) * gate

    forms: dict[str, Callable] = {"regraft": bias_geglu, "eager": eager, "compile": eager}
    try:
        from liger_kernel.transformers.functional import liger_geglu

        halves = lambda x: [half.contiguous() for half in x.chunk(2, dim=-1)]  # noqa: E731
        if device != "cpu":
            forms["liger, tanh, no bias"] = lambda x, b: liger_geglu(*halves(x))
    except ImportError:
        pass
    moved = tokens * width * 2
    inputs = [leaf(tokens, 2 * width, device=device), leaf(2 * width, device=device)]
    return Case("bias + GeGLU", f"{tokens} x 2 x {width}", inputs, forms, 3 * moved, 5 * moved)


def embedding_case(tokens: int, width: int, device: str) -> Case:
    from regraft.kernels import embedding_norm

    words = 30522 if device != "cpu" else 100
    ids, positions, types = (torch.randint(0, n, (tokens,), device=device) for n in (words, 64, 2))
    ours = lambda *t: embedding_norm.embedding_layer_norm(ids, positions, types, *t)  # noqa: E731
    eager = lambda *t: embedding_norm.reference(ids, positions, types, *t)  # noqa: E731
    inputs = [leaf(n, width, device=device) for n in (words, 512, 2)]
    inputs += [leaf(width, device=device) for _ in range(2)]
    moved = tokens * width * 2
    # backward: dy, the rows again, one fp32 value written and read twice, and the tables' gradients written
    work = 4 * moved + 3 * tokens * width * 4 + (words + 512) * width * 4
    forms = {"regraft": ours, "eager": eager, "compile": eager}
    return Case("embeddings + LayerNorm", f"{tokens} x {width}", inputs, forms, 4 * moved, work)


def attention_case(
    size: int, length: int, sequences: int, p: float, device: str, rotary: bool = False, side: int = -1
) -> Case:
    """`rotary`, `side`: as in ModernBERT, whose layers see all positions or those at most `side` away."""
    from regraft.kernels import varlen
    from regraft.kernels.rotary import rotate

    heads = 768 // size if device != "cpu" else 2
    cu = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=device)
    cos, sin = angles(sequences, length, size, device) if rotary else (None, None)
    window = side if 0 <= side < length - 1 else None
    near = None if window is None else band(length, window, device)

    def ours(qkv: Tensor) -> Tensor:
        return varlen.varlen_attention(qkv, cu, length, p=p, cos=cos, sin=sin, window=window)

    def eager(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        padded = [x.view(sequences, length, heads, size).transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=near, dropout_p=p)

    forms = {"regraft": ours, "eager (sdpa, padded)": eager, "compile": eager}
    if device != "cpu":
        flash = -1 if window is None else window
        forms["aten"] = lambda qkv: varlen._flash(qkv, cu, length, size**-0.5, p, flash, cos, sin)
    seen = length if window is None else min(length, 2 * window + 1)
    work = 4 * heads * size * sequences * length * seen
    inputs = [leaf(sequences * length, 3, heads, size, device=device)]
    also = (", rotary" if rotary else "") + (f", window {window}" if window is not None else "")
    shape = f"{sequences} x {length}, head {size}, p {p}{also}"
    keys = {"size": size, "longest": length, "dropout": p > 0, "rotary": rotary, "window": window is not None}
    return Case("attention", shape, inputs, forms, work, 2.5 * work, "FLOPs", keys)


def angles(sequences: int, length: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's position, [tokens, size // 2] each."""
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    turn = (torch.arange(length, device=device)[:, None] * rates).repeat(sequences, 1)
    return turn.cos(), turn.sin()


def band(length: int, window: int, device: str) -> Tensor:
    """Bool [length, length]: which positions are at most `window` away."""
    at = torch.arange(length, device=device)
    return (at[:, None] - at).abs() <= window


def hand_over_cases(device: str) -> Iterator[Case]:
    """Attention over 16k tokens at every size of the table that decides whose kernel runs; on CPU one tiny shape."""
    from regraft.kernels.hand_over import LENGTHS
    from regraft.kernels.varlen import HEAD_SIZES

    sizes, lengths, tokens = (HEAD_SIZES, LENGTHS, 16384) if device != "cpu" else ((32,), (64,), 128)
    for size in sizes:
        for length in lengths:
            for p in (0.0, 0.1):
                yield attention_case(size, length, max(1, tokens // length), p, device)
    for side in (-1, 64):  # ModernBERT's: head size 64
        for length in lengths:
            if side < length - 1:
                yield attention_case(64, length, max(1, tokens // length), 0.0, device, True, side)


def entries(rows: Sequence[Row], cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Whose forward and backward together are faster, by the key of the table. `cases`: what makes each shape's key."""
    from regraft.kernels.hand_over import key_of

    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.name == "attention" and row.who in ("regraft", "aten"):
            by_who = totals.setdefault(row.shape, {})
            by_who[row.who] = by_who.get(row.who, 0.0) + row.milliseconds
    found = {}
    for shape, t in totals.items():
        if len(t) == 2:
            found[key_of(**cases[shape])] = "own" if t["regraft"] < t["aten"] else "aten"
    return found


def measure_hand_over(options: argparse.Namespace) -> None:
    """Fill the table that the attention kernel reads, for the GPU at hand."""
    from regraft.kernels.hand_over import TABLE, write_table

    ceilings = measure_ceilings(options.device)
    rows: list[Row] = []
    about: dict[str, dict[str, Any]] = {}
    for case in hand_over_cases(options.device):
        about[case.shape] = case.keys
        for who in ("regraft", "aten"):
            if who in case.forms:
                try:
                    rows += measure(case, who, case.forms[who], ceilings, options.device)
                except Exception as error:  # without an entry a shape goes to torch's own
                    print(f"not measured: {case.shape} {who}: {told(error)}", flush=True)
    for line in table(rows):
        print(line)
    found = entries(rows, about)
    if options.device == "cpu":
        print("nothing is kept of a CPU: torch has no such attention there")
        return
    major, minor = torch.cuda.get_device_capability()
    about_gpu = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton_version()}
    about_gpu["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_table(options.out or TABLE, 10 * major + minor, found, about_gpu)
    own = sum(who == "own" for who in found.values())
    print(f"{own} of {len(found)} shapes go to our own kernel: {options.out or TABLE}")


def table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        rate = f"{row.rate / 1e12:7.2f} {'TB' if row.unit == 'bytes' else 'TFLOP'}/s"
        times = f"{row.milliseconds:8.4f} ms ({row.low:.4f} to {row.high:.4f})"
        lines.append(f"{row.name:32}{row.shape:30}{row.direction:9} {row.who:22}{times:34}{rate} {row.share:6.1%}")
    return lines


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
