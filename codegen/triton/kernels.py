"""The Triton target: kernels for every loop of a specification, and the function that launches them.

States are summed by kernels that own rows of a state and walk tokens; outputs come from kernels that own a block of
tokens and walk the features (and, under a causal mask, the other tokens of their chunk).  Under a causal mask a state
kernel leaves its running sum once per chunk: memory linear in n.  Features are made on the fly in every tile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from polyattn.codegen.spec import FEATURES, TOKENS, KernelSpec, Loop
from polyattn.codegen.triton.emit import NAMES, SIDES, Kernel, check_pattern, letters, reductions
from polyattn.codegen.triton.scope import Binding, Scope
from polyattn.errors import EmitError
from polyattn.rewriter.planning.plan import Node, walk

CONSTANTS = ("GROUPS", "HEAD_DIM", "VALUE_DIM", "BLOCK_I", "BLOCK_J", "BLOCK_R", "BLOCK_D", "BLOCK_E", "ACC")


@dataclass(frozen=True)
class Launch:
    """One kernel: its text, its arguments, and over what its grid runs."""

    name: str
    text: str
    arguments: tuple[str, ...]
    grid: str


class KernelWriter:
    """All kernels of one specification."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.states: dict[Node, str] = {}
        self.weights: dict[tuple[sympy.Expr, ...], str] = {}
        self.numbers: dict[sympy.Expr, int] = {}
        self.launches: list[Launch] = []
        self.degree = max(
            (n.attr + FEATURES.index(letters(n)[1]) for loop in spec.loops for n in loop.tiles if n.op == "features"),
            default=0,
        )

    def write(self) -> None:
        """Write the kernels of every loop, states first."""
        for number, loop in enumerate(self.spec.loops):
            groups: dict[tuple[str, ...], list[Node]] = {}
            for n in loop.accumulate:
                groups.setdefault(letters(n), []).append(n)
            for axes, found in groups.items():
                self._state_kernel(f"{self.spec.name}_{number}_sum_{_word(axes)}", loop, axes, found)
            by_side: dict[str, list[tuple[str, Node]]] = {}
            for name, n in loop.stores:
                token = next((kind.letter for kind in n.axes if kind.token), None)
                if token is not None:
                    by_side.setdefault(token, []).append((name, n))
            for own, stores in sorted(by_side.items()):
                self._token_kernel(f"{self.spec.name}_{number}_{'queries' if own == 'i' else 'keys'}", own, stores)

    def _kernel(self) -> Kernel:
        kernel = Kernel(dict(self.states))
        kernel.weights, kernel.numbers = self.weights, self.numbers
        return kernel

    # -- prologues -----------------------------------------------------------------------------------------------

    @staticmethod
    def _columns(root: Scope) -> None:
        """Bind the axes of head and value to whole vectors."""
        root.write("a = tl.arange(0, BLOCK_D)  # [BLOCK_D]")
        root.write("a_ok = a < HEAD_DIM")
        root.write("b = tl.arange(0, BLOCK_E)  # [BLOCK_E]; column VALUE_DIM is the one beside the matrix")
        root.write("b_ok = b < VALUE_DIM")
        root.write("b_hat_ok = b <= VALUE_DIM")
        root.bindings |= {"a": Binding("a", "a_ok"), "b": Binding("b", "b_ok"), "b̂": Binding("b", "b_hat_ok")}

    @staticmethod
    def _scalar_value(scope: Scope) -> None:
        column = "tl.minimum(value, VALUE_DIM - 1)"  # what it reads at VALUE_DIM is not used
        scope.bindings |= {"b": Binding(column, "", scalar=True), "b̂": Binding("value", "", scalar=True)}

    def _tokens(self, kernel: Kernel, scope: Scope, token: str, start: str, stop: str) -> Scope:
        """A loop over blocks of tokens between two positions; queries of all heads that share a key head."""
        grouped = token == "i" and self.spec.chunked
        if grouped:
            scope = kernel.open(scope, "for group in range(GROUPS):")
            scope.write("q_base = (head * GROUPS + group) * n_q")
        block = f"BLOCK_{token.upper()}"
        inner = kernel.open(scope, f"for {token}_start in range({start}, {stop}, {block}):")
        inner.write(f"{token} = {token}_start + tl.arange(0, {block})  # [{block}]")
        inner.write(f"{token}_ok = {token} < {stop}")
        inner.bindings[token] = Binding(token, f"{token}_ok")
        return inner

    def _close(self, kernel: Kernel, inner: Scope, outer: Scope) -> None:
        while inner is not outer:
            kernel.close(inner)
            assert inner.parent is not None
            inner = inner.parent

    # -- states --------------------------------------------------------------------------------------------------

    def _state_kernel(self, name: str, loop: Loop, axes: tuple[str, ...], found: list[Node]) -> None:
        kernel = self._kernel()
        root, rows = kernel.root, axes[0]
        token = next(kind.letter for a in found[0].args for kind in a.axes if kind.token)
        for n in found:
            check_pattern(n)
            if reductions(n.args, token, self.states):
                raise EmitError(f"a sum over {token} whose terms need a loop of their own has no Triton code yet")
        root.write("head = tl.program_id(1).to(tl.int64)")
        grid = "1"
        if rows in FEATURES:
            index, rank = NAMES[rows], kernel.rank(rows)
            root.write(f"{index} = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]")
            root.write(f"{index}_ok = {index} < {rank}")
            root.bindings[rows] = Binding(index, f"{index}_ok")
            grid = f"triton.cdiv({rank}, BLOCK_R)"
        wide = len(axes) == 3
        if wide:
            root.write("value = tl.program_id(2)")
        self._columns(root)
        base, size = SIDES[token]
        if token == "j" or not self.spec.chunked:
            root.write(f"{base} = head * {size}")
        made = {n: f"S{len(self.states) + at}" for at, n in enumerate(found)}
        totals = {}
        for n in found:
            totals[n] = kernel.name("total")
            shape = kernel.shape(axes[:2])
            root.write(f"{totals[n]} = tl.zeros({shape}, dtype=ACC)")
        outer, start, stop = root, "0", size
        if self.spec.chunked:
            outer = kernel.open(root, "for step in range(chunks):")
            outer.write("chunk = chunks - 1 - step" if loop.descending else "chunk = step")
            self._store_states(kernel, outer, made, totals, "chunk", wide)
            start, stop = "chunk * chunk_size", f"tl.minimum((chunk + 1) * chunk_size, {size})"
        inner = kernel.open(self._tokens(kernel, outer, token, start, stop), None)
        if wide:
            self._scalar_value(inner)
        for n in found:
            inner.write(f"{totals[n]} = {kernel.contract(n, inner, totals[n])}")
        self._close(kernel, inner, root)
        if not self.spec.chunked:
            self._store_states(kernel, root, made, totals, "", wide)
        self.states |= made
        self._finish(kernel, name, f"({grid}, heads{', VALUE_DIM + 1' if wide else ''})", found, made)

    def _store_states(
        self, kernel: Kernel, outer: Scope, made: Mapping[Node, str], totals: Mapping[Node, str], chunk: str, wide: bool
    ) -> None:
        scope = kernel.open(outer, None)
        if wide:
            self._scalar_value(scope)
        for n, memory in made.items():
            axes = kernel.axes(n, scope)
            address = kernel.state_address(letters(n), axes, scope, chunk)
            checks = kernel.checks(n, axes, scope)
            scope.write(f"tl.store({kernel.pointer(memory)} + {address}, {totals[n]}, mask={checks})")
        kernel.close(scope)

    # -- tokens --------------------------------------------------------------------------------------------------

    def _token_kernel(self, name: str, own: str, stores: list[tuple[str, Node]]) -> None:
        kernel = self._kernel()
        root = kernel.root
        block, (base, size) = f"BLOCK_{own.upper()}", SIDES[own]
        if self.spec.chunked:
            root.write(f"blocks = tl.cdiv(chunk_size, {block})")
            root.write("chunk = tl.program_id(0) // blocks")
            root.write(f"start = chunk * chunk_size + (tl.program_id(0) % blocks) * {block}")
            root.write(f"stop = tl.minimum((chunk + 1) * chunk_size, {size})")
        else:
            root.write(f"start = tl.program_id(0) * {block}")
            root.write(f"stop = {size}")
        root.write(f"{own} = start + tl.arange(0, {block})  # [{block}]")
        root.write(f"{own}_ok = {own} < stop")
        root.bindings[own] = Binding(own, f"{own}_ok")
        grouped = own == "i" and self.spec.chunked
        if grouped:
            root.write("query_head = tl.program_id(1).to(tl.int64)")
            root.write("head = query_head // GROUPS")
            root.write("q_base = query_head * n_q")
            root.write("k_base = head * n_k")
        else:
            root.write("head = tl.program_id(1).to(tl.int64)")
            root.write(f"{base} = head * {size}")
        self._columns(root)
        for axis, found in reductions([n for _, n in stores], own, self.states):
            self._reduction(kernel, own, axis, found)
        for output, n in stores:
            axes = kernel.axes(n, root)
            value = kernel.emit(n, root)
            checks = kernel.checks(n, axes, root)
            row = f"({base} + {kernel.vector(own, axes, root)})"
            rest = [letter for letter in axes if letter != own]
            width = "HEAD_DIM" if rest == ["a"] else "VALUE_DIM"
            address = f"{row} * {width} + {kernel.vector(rest[0], axes, root)}" if rest else row
            memory = kernel.pointer("OUT_" + output)
            root.write(f"tl.store({memory} + {address}, {value}, mask={checks})")
        per_head = "chunks * triton.cdiv(chunk_size, " if self.spec.chunked else f"triton.cdiv({size}, "
        grid = f"({per_head}{block}), heads{' * GROUPS' if grouped else ''})"
        self._finish(kernel, name, grid, [n for _, n in stores], {})

    def _reduction(self, kernel: Kernel, own: str, axis: str, found: list[Node]) -> None:
        """One loop over features or over the other tokens of the chunk, for every contraction that shares it."""
        root = kernel.root
        totals = {}
        for n in found:
            check_pattern(n)
            totals[n] = kernel.name("sum_" + _word([axis]))
            root.write(f"{totals[n]} = tl.zeros({kernel.shape(kernel.axes(n, root))}, dtype=ACC)")
        if axis in TOKENS:
            for n in found:
                if not any(m.op == "mask" and m.attr == "near" for m in walk([n], self.states)):
                    raise EmitError("a sum over the other tokens of a chunk without its mask")
            if axis == "j":  # keys up to the last query of this block
                stop = "tl.minimum(tl.minimum((chunk + 1) * chunk_size, n_k), start + BLOCK_I)"
                inner = self._tokens(kernel, root, "j", "chunk * chunk_size", stop)
            else:  # queries from the first key of this block on
                inner = self._tokens(kernel, root, "i", "start", "tl.minimum((chunk + 1) * chunk_size, n_q)")
        else:
            index, rank = NAMES[axis], kernel.rank(axis)
            inner = kernel.open(root, f"for r_start in range(0, {rank}, BLOCK_R):")
            inner.write(f"{index} = r_start + tl.arange(0, BLOCK_R)  # [BLOCK_R]")
            inner.write(f"{index}_ok = {index} < {rank}")
            inner.bindings[axis] = Binding(index, f"{index}_ok")
        for n in found:
            if any(a.op == "gather" for a in n.args):
                self._jacobian(kernel, inner, n, totals[n])
            elif any(len(a.axes) == 3 for a in n.args):
                self._by_value(kernel, inner, n, totals[n])
            else:
                inner.write(f"{totals[n]} = {kernel.contract(n, inner, totals[n])}")
        self._close(kernel, inner, root)
        root.memo |= totals

    def _jacobian(self, kernel: Kernel, scope: Scope, n: Node, total: str) -> None:
        """Σ_β x[·, β] T[·, σ(β, a)]: every monomial α goes to the variables in it, one slot at a time."""
        gather = next(a for a in n.args if a.op == "gather")
        (factor,) = (a for a in n.args if a is not gather)
        _, degree = gather.attr
        upper, lower = "α", next(letter for letter in letters(gather) if letter in FEATURES)
        if letters(gather.args[0])[-1] != upper or letters(factor)[-1] != lower:
            raise EmitError("a selection of columns in an order that has no Triton code yet")
        tile = kernel.emit(gather.args[0], scope)
        for slot in range(degree):
            index = kernel.name(NAMES[lower])
            edge, rank = kernel.pointer(f"EDGES_{degree}"), kernel.rank(upper)
            inner = kernel.open(scope, None)
            up = scope.binding(upper)
            inner.write(f"# monomial {NAMES[upper]} = monomial {index} times the variable in slot {slot}")
            inner.write(
                f"{index} = tl.load({edge} + {slot} * {rank} + {up.index}, mask={up.ok}, other=-1)  # [BLOCK_R]"
            )
            inner.write(f"{index}_ok = {index} >= 0")
            inner.bindings[lower] = Binding(index, f"{index}_ok")
            column = kernel.column(upper, degree, slot, scope)
            hot = kernel.name("variable")
            inner.write(
                f"{hot} = (({column}[:, None] == a[None, :]) & {index}_ok[:, None]).to(ACC)  # [BLOCK_R, BLOCK_D]"
            )
            product = f"{kernel.emit(factor, inner)} * {tile}"
            inner.write(f'{total} = tl.dot({product}, {hot}, acc={total}, input_precision="ieee", out_dtype=ACC)')
            kernel.close(inner)

    def _by_value(self, kernel: Kernel, scope: Scope, n: Node, total: str) -> None:
        """Σ_b ĝ[·, b] (Φ S_b)[·, a]: one column of values at a time, so that no tile has three axes."""
        wide = next(a for a in n.args if len(a.axes) == 3)
        (factor,) = (a for a in n.args if a is not wide)
        inner = kernel.open(scope, "for value in range(VALUE_DIM + 1):")
        self._scalar_value(inner)
        axes = kernel.axes(n, scope)
        column = kernel.align(kernel.emit(factor, inner), kernel.axes(factor, inner), axes)
        product = kernel.name("by_value")
        inner.write(f"{product} = {kernel.contract(wide, inner)}  # {kernel.shape(axes)}")
        inner.write(f"{total} += {column} * {product}")
        kernel.close(inner)

    # -- text ----------------------------------------------------------------------------------------------------

    def _finish(self, kernel: Kernel, name: str, grid: str, roots: list[Node], made: Mapping[Node, str]) -> None:
        ranks = list(kernel.ranks)
        sizes = ["n_q", "n_k", *ranks, *(["chunk_size", "chunks"] if self.spec.chunked else [])]
        arguments = (*kernel.pointers, *sizes, *CONSTANTS)
        header = ",\n    ".join([*kernel.pointers, *sizes, *(f"{c}: tl.constexpr" for c in CONSTANTS)])
        body = _without_unused(kernel.root.lines)
        text = f"@triton.jit\ndef {name}(\n    {header},\n):\n" + "\n".join(body) + "\n"
        self.launches.append(Launch(name, text, arguments, grid))


def _word(axes: Any) -> str:
    return "_".join(NAMES.get(letter, letter) for letter in axes)


def _without_unused(lines: list[str]) -> list[str]:
    """Drop assignments whose name is never read."""
    while True:
        text = "\n".join(lines)
        kept = []
        for line in lines:
            name = re.match(r"\s*(\w+) = ", line)
            if name and len(re.findall(rf"\b{name[1]}\b", text)) == 1:
                continue
            kept.append(line)
        if len(kept) == len(lines):
            return lines
        lines = kept
