"""The CPU target: a specification as a Python file of torch calls, compiled once and run."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping

import sympy
import torch

from polyattn.codegen import tables
from polyattn.codegen.cpu import tiled
from polyattn.codegen.cpu.draft import Draft
from polyattn.codegen.cpu.emit import LoopWriter
from polyattn.codegen.cpu.fused import DTYPES, FLASH
from polyattn.codegen.cpu.layout import Layout, Sizes, number
from polyattn.codegen.cpu.plan import state_key
from polyattn.codegen.phases import Choose
from polyattn.codegen.spec import QUERY_SIDE, TOKENS, KernelSpec, letters
from polyattn.codegen.tables import Scalars
from polyattn.codegen.target import Fused, Target, TileCosts
from polyattn.errors import EmitError, ScheduleError
from polyattn.rewriter.algebra import monomials
from polyattn.rewriter.algebra.monomials import Basis

_HELPERS = {
    "elsewhere": '''
def elsewhere(parts):
    """For each chunk, the sum over all chunks but itself and its neighbours; in place of what each chunk adds."""
    total, near = parts.sum(0), parts.clone()
    near[1:] += parts[:-1]
    near[:-1] += parts[1:]
    return torch.sub(total, near, out=parts)
''',
    "products": '''
def products(d, starts):
    """Per degree ≥ 2 and variable a: its row, the monomials below in variables ≥ a, and x_a times them."""
    low, at = 1, d + 1
    for offsets in starts[1:]:
        high = at
        for a, offset in offsets:
            rows = high - low - offset
            yield slice(1 + a, 2 + a), slice(low + offset, high), slice(at, at + rows)
            at += rows
        low = high
''',
    "monomials": '''
def monomials(x, phi, starts, views):
    """All monomials of the rows of x [H, T, d], by degree, into phi [H, r, T]: one product per variable and degree."""
    d = x.shape[2]
    phi[:, 0] = 1
    if starts:
        phi[:, 1 : d + 1] = x.mT
    key = (phi.data_ptr(), *phi.shape)
    if key not in views:
        views[key] = [(phi[:, a], phi[:, low], phi[:, high]) for a, low, high in products(d, starts)]
    for x_a, low, high in views[key]:
        torch.mul(x_a, low, out=high)
    return phi
''',
    "gradient": '''
def gradient(t, phi, spare, d, starts, views):
    """∂/∂x_a of Σ_α t_α x^α as [H, d, T]: the products that generate the monomials, backwards.

    t [H, r, T] is used up; phi and spare [H, r_1, T] are the monomials one degree below and memory.
    """
    key = (t.data_ptr(), phi.data_ptr(), spare.data_ptr(), t.shape[2])
    if key not in views:
        views[key] = [
            (phi[:, a], phi[:, low], spare[:, low], t[:, high], t[:, low], t[:, a.start])
            for a, low, high in reversed(list(products(d, starts)))
        ]
    for x_a, low, product, t_high, t_low, t_a in views[key]:
        t_a += torch.mul(low, t_high, out=product).sum(1)
        t_low.addcmul_(x_a, t_high)
    return t[:, 1 : d + 1]
''',
}


@functools.cache
def _written(spec: KernelSpec) -> LoopWriter | str:
    """The loops of a specification, or why there is no code for it."""
    try:
        return LoopWriter(spec)
    except ScheduleError as error:
        return str(error)


@functools.cache
def _text(spec: KernelSpec) -> str:
    if spec.tiled:
        return tiled.text(spec)
    writer = _written(spec)
    if isinstance(writer, str):
        raise EmitError(writer)
    helpers = [text.strip("\n") for name, text in _HELPERS.items() if name in writer.draft.helpers]
    parts = [_header(spec, writer), _weights(writer.draft), *helpers, _run(spec, writer)]
    return "\n\n\n".join(parts) + "\n"


def _header(spec: KernelSpec, writer: LoopWriter) -> str:
    outputs = ", ".join(name for loop in spec.loops for name, _ in loop.stores) or "states"
    degrees = writer.draft.ranks.values()
    family = f"degree {max(degrees)}" if degrees else "no features" if spec.rule is None else spec.rule.title
    lines = [f'"""{spec.name} of low-rank attention, {family}, {spec.mask.title}: {outputs}.', ""]
    lines += [
        "Q [H, groups, n_q, d], G and O [H, groups, n_q, e], D [H, groups, n_q]; K [H, n_k, d], V [H, n_k, e]"
        + (", B [H, n_k]." if "B" in spec.inputs else "."),
        *([spec.rule.inputs_note] if spec.rule is not None and spec.leaves else []),
        "A block has T_k keys and T_q queries, those of all groups that share the keys.",
        "",
    ]
    for loop, walked in zip(spec.loops, writer.walks, strict=True):
        sums = list(dict.fromkeys(writer.draft.states[state_key(n)].name for n in loop.accumulate))
        made = [f"adds to {', '.join(sums)}"] * bool(sums)
        made += [f"writes {', '.join(name for name, _ in loop.stores)}"] * bool(loop.stores)
        lines.append(f"- over {walked.title}: {' and '.join(made)}")
    cost = textwrap.fill(f"FLOPs per head: {spec.cost()}", 118, break_long_words=False)
    return "\n".join([*lines, "", cost, '"""', "", "import torch"])


def _weights(draft: Draft) -> str:
    symbols = sorted({s.name for key in draft.weights for c in key for s in sympy.sympify(c).free_symbols})
    lines = [
        "def weights(scalars):",
        '    """Coefficients of the polynomials whose monomials\' weights ``run`` takes."""',
    ]
    lines += [f'    {s} = scalars["{s}"]' for s in symbols]
    lines.append("    return {")
    for coefficients, name in draft.weights.items():
        lines.append(f'        "{name}": ({", ".join(map(number, coefficients))},),')
    return "\n".join([*lines, "    }"])


def _run(spec: KernelSpec, writer: LoopWriter) -> str:
    draft = writer.draft
    named = dict.fromkeys(("Q", "K", *spec.inputs))
    lines = [f"{', '.join(named)} = " + ", ".join(f'inputs["{name}"]' for name in named)]
    lines += ["H, groups, n_q, d = Q.shape", "n_k = K.shape[1]"]
    lines += [f"e = {name}.shape[-1]" for name in ("V", "G", "O") if name in named][:1]
    lines += [f"d_1 = {name}.shape[-1]" for name in ("QP", "KP") if name in named][:1]
    lines += [f"{name} = {source}" for name, source in draft.sizes.sources.items()]
    lines += [f"{name} = ranks[{degree}]" for name, degree in sorted(draft.ranks.items())]
    lines += [f'{name} = scalars["{name}"]' for name in sorted(draft.symbols)]
    lines += [f'{name} = weights["{name}"]' for name in draft.weights.values()]
    span = max((walked.span for walked in writer.walks), key=len)
    lines += [f"T_q, T_k = groups * min({span}, n_q), min({span}, n_k)", "T = max(T_q, T_k)", "views = {}"]
    kept = next((f"{walked.kept}, " for walked in writer.walks if walked.kept), "")
    if kept:
        lines.append("chunks = (max(n_q, n_k) + block - 1) // block")
    lines += [f"{v.name} = Q.new_zeros({kept}{_sizes(v.layout, draft.sizes)})" for v in draft.states.values()]
    lines += [f"{name} = Q.new_empty({_sizes(layout, draft.sizes)})" for name, layout in draft.memory.items()]
    for value, fills in draft.stacks.values():
        lines += [f"{value.name} = Q.new_empty({_sizes(value.layout, draft.sizes)})", *fills]
    for loop in spec.loops:
        for name, n in loop.stores:
            if n.tokens:
                like = "*Q.shape[:3]" if name in QUERY_SIDE else "H, n_k"
                widths = [draft.sizes.of(x) for x in letters(n) if x not in TOKENS]
                lines.append(f"{name} = Q.new_empty({', '.join([like, *widths])})")
    head = ["@torch.no_grad()", "def run(inputs, weights, starts, ranks, scalars, block):"]
    head.append(
        '    """Outputs by name; ``starts``: per degree, variables a and where those in variables ≥ a begin below."""'
    )
    return "\n".join([*head, *("    " + line if line else "" for line in (*lines, "", *writer.lines))])


def _sizes(layout: Layout, sizes: Sizes) -> str:
    return ", ".join(["H", *map(sizes.of, layout)])


class CPUTarget(Target):
    """Torch calls on tiles that stay in the cache."""

    name = "cpu"
    tiles = True
    added_masks = True

    def tile_costs(self, differentiated: bool, dtype: torch.dtype) -> TileCosts:
        """See :meth:`Target.tile_costs`."""
        return tiled.costs(differentiated, dtype)

    def available(self, device: torch.device) -> bool:
        """CPUs."""
        return device.type == "cpu"

    def unsupported(self, spec: KernelSpec) -> str | None:
        """See :meth:`Target.unsupported`; found by writing the loops, once."""
        if spec.tiled:
            return tiled.unsupported(spec)
        writer = _written(spec)
        return writer if isinstance(writer, str) else None

    def emit(self, spec: KernelSpec) -> str:
        """An importable Python file; sizes are read from the tensors that its ``run`` is given. Of a specification in
        tiles it has C++, in place of which torch code runs where that cannot be compiled."""
        return _text(spec)

    def run(
        self,
        spec: KernelSpec,
        inputs: Mapping[str, torch.Tensor],
        scalars: Scalars,
        basis: Basis,
        block: int,
        choose: Choose | None = None,
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Target.run`."""
        if spec.tiled:
            assert choose is not None, "a specification in tiles needs a choice of near pairs"
            return tiled.run(spec, inputs, scalars, block, choose)
        module, writer, sample = tables.module(f"cpu_{spec.name}", _text(spec)), _written(spec), inputs["Q"]
        assert isinstance(writer, LoopWriter)
        weights = {
            name: tables.weights(coefficients, basis, sample.dtype, sample.device)
            for name, coefficients in module.weights(scalars).items()
        }
        varied = [name for name in writer.draft.symbols if isinstance(scalars[name], torch.Tensor)]
        if varied:
            raise ScheduleError(f"coefficients {varied} differ from head to head outside of weights of monomials")
        ranks = [monomials.rank(basis.below(m)) for m in range(basis.degree + 1)]
        made: dict[str, torch.Tensor] = module.run(inputs, weights, monomials.layout(basis), ranks, scalars, block)
        return made

    def fused(self, q: torch.Tensor) -> Fused | None:
        """torch's flash kernel."""
        return FLASH if q.dtype in DTYPES else None

    def chunk_length(self, below: int) -> int:
        """A quarter of the rank, from 128 to 256, was fastest for head dims 16 to 64 (docs/performance.md)."""
        return min(256, max(128, below // 4))


CPU = CPUTarget()
