"""Python source of the loops of a specification: nodes of a plan become torch calls on tiles.

Large tiles lie in memory that is allocated once and used again by every block; what dies is overwritten in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from polyattn.codegen.cpu.layout import (
    Layout,
    Value,
    column,
    einsum,
    group,
    large,
    matrices,
    number,
    ordered,
    rank_name,
    shape_text,
    shared,
    size,
)
from polyattn.codegen.cpu.plan import SIDES, Body, Gradient, gradient, product, state_key, steps, weighted
from polyattn.codegen.spec import FEATURES, QUERY_SIDE, TOKENS, KernelSpec, Loop, accumulates, letters
from polyattn.errors import ScheduleError
from polyattn.rewriter.planning.plan import Node, walk


class Writer:
    """Writes the loops of a specification.

    After :meth:`write`: ``loops`` are the lines of the function's loops, ``states`` the running sums, ``weights`` the
    coefficients of each table of weights, ``memory`` the layouts of what is allocated once, ``stacks`` the
    concatenations and their constant columns, ``symbols`` the scalars that the loops use.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.loops: list[str] = []
        self.states: dict[object, Value] = {}
        self.weights: dict[tuple[sympy.Expr, ...], str] = {}
        self.memory: dict[str, Layout] = {}
        self.stacks: dict[Node, tuple[Value, list[str]]] = {}
        self.symbols: set[str] = set()
        self.helpers: set[str] = set()
        self.ranks: dict[str, int] = {}
        self._free: dict[Layout, list[str]] = {}
        self._values: dict[Node, Value] = {}
        self._weighted: dict[tuple[str, str], Value] = {}
        roots = [n for loop in spec.loops for n in (*loop.tiles, *loop.accumulate)]
        nodes = list(walk([*roots, *(n for _, n in spec.states)]))
        self._known = [tuple(n.attr) for n in nodes if n.op == "weights"]
        for n in nodes:
            if n.op == "features":
                self.ranks[rank_name(next(x for x in letters(n) if x in FEATURES))] = n.attr

    # -- loops ---------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write every loop and the line that returns the results."""
        results = []
        for loop in self.spec.loops:
            self._loop(loop)
            results += [f'"{name}": {name}' for name, n in loop.stores if n.tokens]
        for name, n in self.spec.states:
            body = Body()
            value = self._state(n, body)
            self.loops += body.before
            order = [str(value.layout.index(x) + 1) for x in letters(n)]
            results.append(f'"{name}": {value.name}.permute(0, {", ".join(order)})')
        self.loops.append(f"return {{{', '.join(results)}}}")

    def _loop(self, loop: Loop) -> None:
        stores = {n: name for name, n in loop.stores if n.tokens}
        sums = []
        for n in loop.accumulate:
            if state_key(n) not in self.states:
                layout = ordered(letters(n))
                self.states[state_key(n)] = Value(f"state_{len(self.states) + 1}", layout)
                sums.append(n)
        readers: dict[Node, int] = {}
        for n in (*loop.tiles, *loop.accumulate):
            for a in n.args:
                readers[a] = readers.get(a, 0) + 1
        body = Body(readers, stores, self.spec.chunked, max(self.ranks.values(), default=0))
        if self.spec.elsewhere and loop.stores and loop.axis is not None:
            body.own = loop.axis.letter
        for n in steps(body, stores, sums):
            if n.op == "features":
                body.tallest[n.args[0]] = max(body.tallest.get(n.args[0], n), n, key=lambda f: int(f.attr))
        order = steps(body, stores, sums)
        for at, n in enumerate(order):
            for read in (n, *body.reads(n)):
                body.last[body.owner(read)] = at
        for at, n in enumerate(order):
            body.at = at
            if accumulates(n):
                self._accumulate(n, body)
            else:
                body.values[n] = self._tile(n, body)
            if n in stores:
                self._store(stores[n], body.values[n], body)
            for dead in [m for m in body.memory if body.last[m] <= at]:
                self._release(body.memory.pop(dead))
        if self.spec.elsewhere and loop.stores:
            used = [v for v in self.states.values() if any(f"far_{v.name}" in line for line in body.lines)]
            body.lines[:0] = [f"far_{v.name} = {v.name}[start // block]  # {v.shape()}" for v in used]
        self.loops += [*body.before, *self._header(loop), *("    " + line for line in body.lines)]
        if self.spec.elsewhere:
            self.loops += [f"elsewhere({self.states[state_key(n)].name})" for n in sums]
        self.loops.append("")

    def _header(self, loop: Loop) -> list[str]:
        """The line of a loop, and how many tokens its block has."""
        if loop.axis is None:
            walked = "range(0, max(n_q, n_k), block)"
            return [
                f"for start in {f'reversed({walked})' if loop.descending else walked}:",
                "    rows, T_k = max(0, min(block, n_q - start)), max(0, min(block, n_k - start))",
                "    T_q = groups * rows",
            ]
        if self.spec.elsewhere and loop.stores:
            queries = loop.axis.letter == "i"
            own, other = ("n_q", "n_k") if queries else ("n_k", "n_q")
            tokens = (f"min(block, {own} - start)", "max(0, above - below)")
            return [
                f"for start in range(0, {own}, block):",
                f"    below, above = max(0, start - block), min({other}, start + 2 * block)",
                f"    rows, T_k = {', '.join(tokens if queries else tokens[::-1])}",
                "    T_q = groups * rows",
            ]
        if loop.axis.letter == "i":
            return [
                "for start in range(0, n_q, block):",
                "    rows = min(block, n_q - start)",
                "    T_q = groups * rows",
            ]
        return ["for start in range(0, n_k, block):", "    T_k = min(block, n_k - start)"]

    def _accumulate(self, n: Node, body: Body) -> None:
        state, made = self.states[state_key(n)], product(n)
        operands = [self._value(a, body) for a in made.operands]
        pair = matrices(operands, state.layout)
        if self.spec.elsewhere:
            self.helpers.add("elsewhere")
            part = Value(f"{state.name}[start // block]", state.layout)
            if pair is None:
                body.lines.append(f"{part.name} = {einsum(operands, state.layout)}")
            else:
                body.lines.append(f"{group(part, pair[2])}.copy_(torch.bmm({pair[0]}, {pair[1]}))")
        elif pair is None:
            body.lines.append(f"{state.name} += {einsum(operands, state.layout)}")
        else:
            body.lines.append(f"{group(state, pair[2])}.baddbmm_({pair[0]}, {pair[1]})")

    def _store(self, name: str, value: Value, body: Body) -> None:
        token = next(x for x in value.layout if x in TOKENS)
        rows = value.spread((token, *(x for x in value.layout if x != token)))
        if name in QUERY_SIDE:
            body.lines.append(f"{name}[:, :, start : start + block] = {rows}.unflatten(1, (groups, rows))")
        else:
            body.lines.append(f"{name}[:, start : start + block] = {rows}")

    # -- memory --------------------------------------------------------------------------------------------------

    def _allocate(self, n: Node | None, layout: Layout, body: Body) -> str:
        """Memory for a tile as an expression; it is the node's until its last reader has run."""
        kind = shared(layout)
        free = self._free.setdefault(kind, [])
        if not free:
            free.append(f"memory_{len(self.memory) + 1}")
            self.memory[free[0]] = kind
        name = free.pop()
        if n is not None:
            body.memory[n] = name
        dims = [":", *(f":{size(x)}" if x in TOKENS else ":" for x in layout)]
        return f"{name}[{', '.join(['...', dims[-1]] if layout[0] not in TOKENS else dims)}]"

    def _release(self, name: str) -> None:
        self._free[self.memory[name]].append(name)

    def _define(self, n: Node, layout: Layout, code: str, body: Body) -> Value:
        """A line that gives a tile its name."""
        value = Value(body.name(n), layout)
        body.lines.append(f"{value.name} = {code}  # {shape_text(layout)}")
        return value

    # -- values --------------------------------------------------------------------------------------------------

    def _value(self, n: Node, body: Body) -> Value:
        if n in body.values:
            return body.values[n]
        if n.op == "weights":
            return Value(self._table(n.attr), letters(n))
        return self._state(n, body)

    def _table(self, coefficients: tuple[sympy.Expr, ...]) -> str:
        """The name of a table of weights."""
        return self.weights.setdefault(tuple(coefficients), f"w_{len(self.weights) + 1}")

    def _number(self, c: object) -> str:
        self.symbols |= {s.name for s in sympy.sympify(c).free_symbols}
        return number(c)

    def _state(self, n: Node, body: Body) -> Value:
        """A value without tokens; what is made of a running sum is made in every chunk."""
        if accumulates(n):
            value, weights = self.states[state_key(n)], product(n).scale
            if self.spec.elsewhere:
                value = Value(f"far_{value.name}", value.layout)
            return value if weights is None else self._weigh(value, weights.attr, n.scanned, body)
        if n in self._values:
            return self._values[n]
        if n.op == "input":
            self._values[n] = Value(str(n.attr), letters(n))
            return self._values[n]
        weights, rest = weighted(n)
        if weights is not None:
            changes = any(m.scanned for m in walk([n]))
            return self._weigh(self._state(rest, body), weights.attr, changes, body)
        if n.op in ("contract", "sum"):
            operands = [self._state(a, body) for a in n.args]
            changes = any(m.scanned for m in walk([n]))
            name = body.unused("of_states") if changes else f"of_states_{len(self._values) + 1}_before"
            made = Value(name, ordered(letters(n)))
            (body.values if changes else self._values)[n] = made
            code = einsum(operands, made.layout) if n.op == "contract" else self._total(n, operands, made.layout)
            (body.lines if changes else body.before).append(f"{made.name} = {code}  # {made.shape()}")
            return made
        raise ScheduleError(f"the CPU target has no code for the state {n} = {n.op}{n.args}")

    def _weigh(self, value: Value, coefficients: tuple[sympy.Expr, ...], changes: bool, body: Body) -> Value:
        """A state times weights of its monomials."""
        key, known = (value.name, self._table(coefficients)), body.weighted if changes else self._weighted
        if key not in known:
            table = Value(key[1], tuple(x for x in value.layout if x in FEATURES))
            known[key] = Value(f"{value.name}_{key[1]}", value.layout)
            line = f"{known[key].name} = {value.name} * {table.spread(value.layout)}  # {value.shape()}"
            (body.lines if changes else body.before).append(line)
        return known[key]

    # -- tiles ---------------------------------------------------------------------------------------------------

    def _tile(self, n: Node, body: Body) -> Value:
        found = gradient(n)
        if found is not None:
            return self._gradient(n, found, body)
        if n.op == "input":
            query = n.attr in QUERY_SIDE
            tokens = "start : start + block" if body.own in (None, "i" if query else "j") else "below:above"
            code = f"{n.attr}[:, :, {tokens}].flatten(1, 2)" if query else f"{n.attr}[:, {tokens}]"
            return self._define(n, letters(n), code, body)
        if n.op == "features":
            return self._features(n, body)
        if n.op == "sum":
            return self._sum(n, body)
        if n.op == "concat":
            return self._concat(n, body)
        args = [self._value(a, body) for a in n.args if a.op != "mask"]
        if n.op == "map":
            call = "exp" if n.attr == "exp" else "reciprocal"
            return self._define(n, args[0].layout, self._in_place(n, args[0], f".{call}", body), body)
        if n.op == "part":
            return self._part(n, args[0], body)
        if n.op == "contract" and len(args) < len(n.args):
            return self._masked(n, args[0], body)
        if n.op == "contract":
            return self._contract(n, args, body)
        raise ScheduleError(f"the CPU target has no code for {n} = {n.op}{n.args}")

    def _features(self, n: Node, body: Body) -> Value:
        layout = ordered(letters(n))
        owner = body.owner(n)
        if owner is not n:
            return self._define(n, layout, f"{body.values[owner].name}[:, :{size(layout[0])}]", body)
        self.helpers |= {"products", "monomials"}
        memory = self._allocate(n, layout, body)
        code = f"monomials({body.values[n.args[0]].name}, {memory}, starts[:{n.attr}], views)"
        return self._define(n, layout, code, body)

    def _gradient(self, n: Node, found: Gradient, body: Body) -> Value:
        layout = ordered(letters(found.rows))
        # the gradient does not read the constant monomial: weights that differ only there serve as well
        coefficients = next((c for c in self._known if c[1:] == found.coefficients[1:]), found.coefficients)
        memory = self._allocate(n, layout, body)
        name, scaled = body.unused(f"t_{SIDES[layout[-1]]}"), False
        if found.rows in body.values:
            rows = body.values[found.rows]
        else:
            operands = []
            for a in found.rows.args:
                value = self._value(a, body)
                if not a.tokens and layout[0] in value.layout and not scaled:
                    # weights of a state are fewer products than weights of a tile
                    scaled = True
                    changes = any(m.scanned for m in walk([a]))
                    value = self._weigh(value, coefficients, changes, body)
                operands.append(value)
            rows = self._product(operands, layout, memory, name, body)
        if not scaled:
            body.lines.append(
                f"{name} = torch.mul({rows.spread(layout)}, {self._table(coefficients)}[..., None], out={memory})"
            )
        target, degree = ordered(letters(n)), found.low.attr + 1
        if degree == 1:
            return self._define(n, target, f"{name}[:, 1:]", body)
        self.helpers.add("gradient")
        low = body.values[found.low]
        spare = self._allocate(None, low.layout, body)
        self._release(spare.partition("[")[0])
        return self._define(n, target, f"gradient({name}, {low.name}, {spare}, d, starts[:{degree}], views)", body)

    def _total(self, n: Node, values: Sequence[Value], layout: Layout) -> str:
        """The expression of a sum of multiples of values in a layout."""
        coefficients, orders = n.attr
        for a, order in zip(n.args, orders, strict=True):
            named = tuple(None if p is None else letters(a)[p] for p in order)
            if any(x is not None and x != y for x, y in zip(named, letters(n), strict=True)):
                raise ScheduleError(f"the CPU target has no code for the sum {n} over axes of other kinds")
        text = ""
        for c, value in zip(coefficients, values, strict=True):
            term, negative = value.spread(layout), sympy.sympify(c).could_extract_minus_sign()
            factor = self._number(-c if negative else c)
            term = term if factor == "1" else f"({factor}) * {term}" if " " in factor else f"{factor} * {term}"
            text += (" - " if text else "-") + term if negative else (" + " if text else "") + term
        return text

    def _sum(self, n: Node, body: Body) -> Value:
        coefficients, _ = n.attr
        if body.reads(n) != n.args:
            (inner,) = n.args
            operands = [self._value(a, body) for a in inner.args]
            layout = ordered(letters(n))
            pair = matrices(operands, layout)
            if pair is not None and pair[2] == (1, 1):
                memory = self._allocate(n, layout, body)
                made = self._define(n, layout, memory, body)
                factor = self._number(coefficients[0])
                body.lines.append(f"{made.name}.baddbmm_({pair[0]}, {pair[1]}, beta=0, alpha={factor})")
                return made
            raise ScheduleError(f"the CPU target has no code for {n}, a multiple of {inner} = contract{inner.args}")
        values = [self._value(a, body) for a in n.args]
        layout = next((v.layout for v in values if set(v.layout) == set(letters(n))), ordered(letters(n)))
        return self._define(n, layout, self._total(n, values, layout), body)

    def _concat(self, n: Node, body: Body) -> Value:
        widths, constants = n.attr
        layout = letters(n)
        name = body.base(n)
        wide = next(k for k, (w, c) in enumerate(zip(widths, constants, strict=True)) if w is not None and c is None)
        if n not in self.stacks:
            used = [v.name for v, _ in self.stacks.values()]
            memory = f"{name}_memory" + (f"_{len(used) + 1}" if f"{name}_memory" in used else "")
            fills = [
                f"{memory}[:, :, {column(k, wide, len(widths))}] = {self._number(c)}"
                for k, c in enumerate(constants)
                if c is not None
            ]
            self.stacks[n] = Value(memory, layout), fills
        value = self._define(n, layout, f"{self.stacks[n][0].name}[:, :{size(layout[0])}]", body)
        pending = iter(n.args)
        for k, c in enumerate(constants):
            if c is None:
                part = self._value(next(pending), body)
                target = layout if k == wide else layout[:1]
                source = Value(part.name, tuple("b̂" if k == wide and x not in TOKENS else x for x in part.layout))
                body.lines.append(f"{value.name}[:, :, {column(k, wide, len(widths))}] = {source.spread(target)}")
        return value

    def _part(self, n: Node, whole: Value, body: Body) -> Value:
        part, widths = n.attr
        wide = next((k for k, w in enumerate(widths) if w is not None), len(widths))
        axis = whole.layout.index(n.args[0].axes[-1].letter)
        dims = [":"] * (axis + 1) + [column(part, wide, len(widths))]
        kept = letters(n)
        layout = tuple(kept[-1] if k == axis else x for k, x in enumerate(whole.layout) if k != axis or part == wide)
        return self._define(n, layout, f"{whole.name}[{', '.join(dims)}]", body)

    def _masked(self, n: Node, value: Value, body: Body) -> Value:
        source = next(a for a in n.args if a.op != "mask")
        if value.layout != TOKENS or set(letters(n)) != set(TOKENS):
            raise ScheduleError(f"the CPU target masks scores only, not {n}")
        if body.dies(source) or (self.spec.elsewhere and source not in body.memory):
            if source in body.memory:
                body.memory[n] = body.memory.pop(source)
            made = value
        else:
            made = self._define(n, value.layout, f"{self._allocate(n, value.layout, body)}.copy_({value.name})", body)
        if not self.spec.elsewhere:  # of which all near pairs take part
            body.lines.append(
                f"{made.name}.unflatten(1, (groups, rows)).tril_()  # keys up to the query's own position"
            )
        return made

    def _contract(self, n: Node, args: list[Value], body: Body) -> Value:
        result, involved = set(letters(n)), set().union(*(v.layout for v in args))
        widest = max(args, key=lambda v: len(v.layout))
        if involved == result or (
            involved == set(widest.layout) and len(args) == 2 and not matrices(args, ordered(result))
        ):
            return self._rowwise(n, args, widest, body)
        layout = ordered(result)
        memory = self._allocate(n, layout, body) if large(layout) else None
        return self._product(args, layout, memory, body.name(n), body)

    def _product(self, args: Sequence[Value], layout: Layout, memory: str | None, name: str, body: Body) -> Value:
        """A matrix product, or an einsum where the axes do not lie so."""
        pair = matrices(args, layout) if len(args) == 2 else None
        made = Value(name, layout)
        if pair is None:
            code = einsum(args, layout)
            body.lines.append(f"{name} = {code if memory is None else f'{memory}.copy_({code})'}  # {made.shape()}")
        elif memory is None:
            body.lines.append(f"{name} = torch.bmm({pair[0]}, {pair[1]})  # {made.shape()}")
        elif pair[2] == (1, 1):
            body.lines.append(f"{name} = torch.bmm({pair[0]}, {pair[1]}, out={memory})  # {made.shape()}")
        else:
            body.lines.append(f"{name} = {memory}  # {made.shape()}")
            body.lines.append(f"torch.bmm({pair[0]}, {pair[1]}, out={group(made, pair[2])})")
        return made

    def _rowwise(self, n: Node, args: Sequence[Value], widest: Value, body: Body) -> Value:
        """A product of corresponding elements, and its sum over axes that go."""
        result = letters(n)
        involved = tuple(dict.fromkeys(x for v in args for x in v.layout))
        space = widest.layout if len(widest.layout) == len(involved) else ordered(involved)
        layout = tuple(x for x in space if x in result)
        sums = [k + 1 for k, x in enumerate(space) if x not in result]
        total = f".sum({sums[0] if len(sums) == 1 else tuple(sums)})" if sums else ""
        if len(args) == 1:
            return self._define(n, layout, args[0].spread(space) + total, body)
        factors = [v.spread(space, copy=large(space)) for v in args]
        if not large(space):
            code = " * ".join(factors)
            return self._define(n, layout, f"({code}){total}" if total else code, body)
        dying = next((a for a, v in zip(n.args, args, strict=True) if v.layout == space and body.dies(a)), None)
        if dying is not None:
            memory = body.values[dying].name
            if not total:
                body.memory[n] = body.memory.pop(dying)
        else:
            memory = self._allocate(None if total else n, space, body)
            if total:
                self._release(memory.partition("[")[0])
        return self._define(n, layout, f"torch.mul({', '.join(factors)}, out={memory}){total}", body)

    def _in_place(self, n: Node, value: Value, call: str, body: Body) -> str:
        """An elementwise function, over its argument's memory where nobody reads that any more."""
        (source,) = n.args
        if not large(value.layout):
            return f"{value.name}{call}()"
        if body.dies(source):
            body.memory[n] = body.memory.pop(source)
            return f"{value.name}{call}_()"
        return f"torch{call}({value.name}, out={self._allocate(n, value.layout, body)})"
