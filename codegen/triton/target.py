"""The Triton target: the emitted file of a specification, its tables, its launch, its compilation without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import sympy
import torch

from polyattn.codegen import tables
from polyattn.codegen.phases import Choose
from polyattn.codegen.spec import FEATURES, QUERY_SIDE, KernelSpec
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import Fused, Target
from polyattn.codegen.triton.emit import letters, rank_name
from polyattn.codegen.triton.fused import kernel_for
from polyattn.codegen.triton.kernels import CONSTANTS, KernelWriter, Launch
from polyattn.errors import EmitError, ScheduleError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.monomials import Basis
from polyattn.rewriter.masks.mask import Sums

MAX_GRID = 65535
"""Programs along the second axis of a CUDA grid."""
BLOCK_TOKENS, BLOCK_RANK = 32, 32
"""Tokens and features per tile; any power of two from 16 on."""
_SIZES = {"a": "HEAD_DIM", "b": "VALUE_DIM", "b̂": "VALUE_DIM + 1"}
_READABLE = {"a": "d", "b": "e", "b̂": "e + 1"}


@dataclass(frozen=True)
class Emitted:
    """An emitted file and what its launcher must be given."""

    text: str
    launches: tuple[Launch, ...]
    weights: Mapping[str, tuple[sympy.Expr, ...]]
    numbers: tuple[sympy.Expr, ...]
    degree: int


@functools.cache
def _written(spec: KernelSpec) -> Emitted | str:
    """The file of a specification: a kernel for each loop's states and outputs, and ``run``, which launches them; or
    why there is no code."""
    if spec.tiled:
        return "programs in tiles have no Triton code yet"
    for n in (n for loop in spec.loops for n in (*loop.tiles, *loop.accumulate)):
        own = next((kind for kind in n.axes if kind.feature), None)
        if own is not None:
            title = f"features of the axis {own.letter}" if spec.rule is None else spec.rule.title
            return f"{title} have no Triton code yet"
    if spec.mask.sums is Sums.ELSEWHERE:
        return f"an exact {spec.mask.name} has no Triton code yet"
    writer = KernelWriter(spec)
    try:
        writer.write()
    except ScheduleError as error:
        return str(error)
    for name, n in spec.states:
        if n not in writer.states:
            return f"the state {name} that is to be returned is no sum over tokens"
    weights = {name: coefficients for coefficients, name in writer.weights.items()}
    text = "\n\n".join([_header(spec, writer), *(launch.text for launch in writer.launches), _run_text(spec, writer)])
    return Emitted(text, tuple(writer.launches), weights, tuple(writer.numbers), writer.degree)


def emitted(spec: KernelSpec) -> Emitted:
    """The file of a specification, and what its launcher must be given.

    Raises:
        EmitError: there is no Triton code for it; the message says why.
    """
    made = _written(spec)
    if isinstance(made, str):
        raise EmitError(made)
    return made


def _header(spec: KernelSpec, writer: KernelWriter) -> str:
    lines = [f'"""{spec.name} of low-rank attention, degree {writer.degree}, {spec.mask.title}.', ""]
    weights = ", B [heads, n_k]" if "B" in spec.inputs else ""
    lines.append(
        f"Inputs: Q, G, O [heads, groups, n_q, d or e], D [heads, groups, n_q], K, V [heads, n_k, d or e]{weights}."
    )
    for n, name in writer.states.items():
        per = "heads, chunks" if n.scanned else "heads"
        sizes = ", ".join(_READABLE.get(x, "r") for x in letters(n))
        lines.append(f"State {name} [{per}, {sizes}].")
    for name, coefficients in ((name, c) for c, name in writer.weights.items()):
        lines.append(f"{name}: weights of the monomials for the polynomial with coefficients {coefficients}.")
    lines += [f"FLOPs per head: {spec.cost()}", '"""', ""]
    lines += ["import torch", "import triton", "import triton.language as tl"]
    return "\n".join(lines)


def _run_text(spec: KernelSpec, writer: KernelWriter) -> str:
    lines = [
        "def run(inputs, tables, ranks, chunk_size, blocks, acc, dtype):",
        '    """Launch every kernel in order; outputs by name, in the accumulator\'s dtype."""',
        '    Q, K, V = inputs["Q"], inputs["K"], inputs["V"]',
        "    heads, GROUPS, n_q, HEAD_DIM = Q.shape",
        "    n_k, VALUE_DIM = K.shape[1], V.shape[-1]",
        "    ACC, new = acc, dict(dtype=dtype, device=Q.device)",
        "    BLOCK_I, BLOCK_J, BLOCK_R = blocks",
        "    BLOCK_D = max(16, triton.next_power_of_2(HEAD_DIM))",
        "    BLOCK_E = max(16, triton.next_power_of_2(VALUE_DIM + 1))",
    ]
    if spec.chunked:
        lines.append("    chunks = triton.cdiv(max(n_q, n_k), chunk_size)")
    pointers = dict.fromkeys(a for launch in writer.launches for a in launch.arguments)
    lines += [f'    {a} = ranks["{a}"]' for a in pointers if a.startswith("R")]
    lines += [f'    {a} = inputs["{a}"]' for a in pointers if a in spec.inputs and a not in ("Q", "K", "V")]
    for a in pointers:
        if a.startswith(("COLUMNS", "EDGES", "NUMBERS")) or a in writer.weights.values():
            lines.append(f'    {a} = tables["{a}"]')
        if a.startswith("OUT_"):
            name = a.removeprefix("OUT_")
            like = "*Q.shape[:-1]" if name in QUERY_SIDE else "*K.shape[:-1]"
            width = {"D": "", "dB": "", "dQ": "HEAD_DIM", "dK": "HEAD_DIM"}.get(name, "VALUE_DIM")
            lines.append(f"    {a} = torch.empty(({like}, {width}), **new)")
    for n, name in writer.states.items():
        sizes = ", ".join(_SIZES.get(x) or rank_name(x) for x in letters(n))
        lines.append(f"    {name} = torch.empty((heads, {'chunks, ' if n.scanned else ''}{sizes}), **new)")
    if not spec.chunked:
        lines.append("    n_q, GROUPS = n_q * GROUPS, 1  # without a mask, all groups are rows of one matrix")
    for launch in writer.launches:
        lines.append(f"    {launch.name}[{launch.grid}]({', '.join(launch.arguments)}, enable_fp_fusion=True)")
    stored = {name: f"OUT_{name}" for loop in spec.loops for name, n in loop.stores if n.tokens}
    for name, n in spec.states:
        order = [letters(n).index(kind.letter) + 1 for kind in n.axes]
        stored[name] = f"{writer.states[n]}.permute(0, {', '.join(map(str, order))}).contiguous()"
    lines.append("    return {" + ", ".join(f'"{name}": {value}' for name, value in stored.items()) + "}")
    return "\n".join(lines) + "\n"


def _module(spec: KernelSpec) -> ModuleType:
    return tables.module(f"triton_{spec.name}", emitted(spec).text)


def interpreted() -> bool:
    """Whether Triton interprets kernels in this process, on any device (TRITON_INTERPRET=1)."""
    try:
        import triton
    except ImportError:
        return False
    knobs = getattr(getattr(triton, "knobs", None), "runtime", None)
    return bool(knobs and knobs.interpret)


@functools.lru_cache(maxsize=64)
def _constant_tables(basis: Basis, device: torch.device) -> dict[str, torch.Tensor]:
    made = {
        f"COLUMNS_{low}": torch.as_tensor(monomials.columns(basis.below(low)), device=device)
        for low in range(basis.degree + 1)
    }
    if basis.degree:
        made[f"EDGES_{basis.degree}"] = torch.as_tensor(monomials.edges(basis), device=device)
    return made


@functools.lru_cache(maxsize=64)
def _number_table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


class TritonTarget(Target):
    """Triton kernels on GPUs."""

    name = "triton"
    may_fail = True

    def available(self, device: torch.device) -> bool:
        """GPUs."""
        return device.type == "cuda"

    def unsupported(self, spec: KernelSpec) -> str | None:
        """See :meth:`Target.unsupported`; found by writing the kernels, once."""
        made = _written(spec)
        return made if isinstance(made, str) else None

    def emit(self, spec: KernelSpec) -> str:
        """See :meth:`Target.emit`."""
        return emitted(spec).text

    def run(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: Basis,
        block: int,
        choose: Choose | None = None,
        blocks: tuple[int, int, int] = (BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_RANK),
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Target.run`.

        Args:
            blocks: queries, keys and features per tile, powers of two from 16 on.
        """
        import triton.language as tl

        file = emitted(spec)
        inputs = {name: x.contiguous() for name, x in inputs.items()}
        sample = inputs["Q"]
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32

        given = dict(_constant_tables(basis.below(file.degree), sample.device))
        for name, coefficients in file.weights.items():
            values = [tables.value(c, scalars) for c in coefficients]
            given[name] = tables.weights(values, basis, dtype, sample.device)
            given[name] = given[name].expand(len(sample), -1).contiguous()
        numbers = tuple(tables.number(c, scalars) for c in file.numbers)
        given["NUMBERS"] = _number_table(numbers or (0.0,), dtype, sample.device)
        degree = file.degree
        ranks = {rank_name(FEATURES[low]): monomials.rank(basis.below(degree - low)) for low in range(degree + 1)}
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        made: dict[str, torch.Tensor] = _module(spec).run(inputs, given, ranks, block, blocks, acc, dtype)
        return made

    def fused(self, q: torch.Tensor) -> Fused | None:
        """torch's memory-efficient kernel, once it has reproduced a reference on the device."""
        return kernel_for(q)

    def heads_at_once(self, groups: int, elements: int) -> int:
        """The whole second axis of a grid."""
        return max(1, MAX_GRID // groups)


TRITON = TritonTarget()


def compile_offline(spec: KernelSpec, d: int, e: int, capability: int = 90, dtype: str = "fp32") -> dict[str, Any]:
    """Compile every kernel of a specification for an NVIDIA architecture, on any machine; by kernel name.

    The results' ``asm["cubin"]`` and metadata tell registers, spills and shared memory.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, made = _module(spec), {}
    constants = {
        "GROUPS": 1,
        "HEAD_DIM": d,
        "VALUE_DIM": e,
        "BLOCK_I": BLOCK_TOKENS,
        "BLOCK_J": BLOCK_TOKENS,
        "BLOCK_R": BLOCK_RANK,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_E": max(16, triton.next_power_of_2(e + 1)),
        "ACC": tl.float32 if dtype == "fp32" else tl.float64,
    }
    for launch in emitted(spec).launches:
        signature = {}
        for argument in launch.arguments:
            if argument in CONSTANTS:
                signature[argument] = "constexpr"
            elif argument.startswith(("COLUMNS", "EDGES")):
                signature[argument] = "*i32"
            elif argument in ("n_q", "n_k", "chunk_size", "chunks") or argument.startswith("R"):
                signature[argument] = "i32"
            else:
                signature[argument] = "*" + dtype
        source = ASTSource(getattr(module, launch.name), signature, constexprs=constants)
        options = {"enable_fp_fusion": True}
        made[launch.name] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made
