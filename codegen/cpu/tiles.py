"""Tiles of the CPU target: a node of a plan becomes torch calls on what is there; what dies is overwritten in place."""

from __future__ import annotations

from collections.abc import Sequence

from polyattn.codegen.cpu.draft import Draft
from polyattn.codegen.cpu.layout import Layout, Value, column, einsum, group, large, matrices, ordered
from polyattn.codegen.cpu.plan import SIDES, Body, Gradient, gradient
from polyattn.codegen.cpu.states import States, changes
from polyattn.codegen.spec import QUERY_SIDE, TOKENS, letters
from polyattn.errors import EmitError
from polyattn.rewriter.planning.plan import Node


class Tiles:
    """Writes the tiles of a loop."""

    def __init__(self, draft: Draft, states: States) -> None:
        self.draft, self.states = draft, states

    def tile(self, n: Node, body: Body) -> Value:
        """Writes the lines that compute a tile.

        Raises:
            EmitError: there is no code for it.
        """
        found = gradient(n)
        if found is not None:
            return self._gradient(n, found, body)
        if n.op == "input":
            query = n.attr in QUERY_SIDE
            tokens = body.walk.tokens("i" if query else "j")
            code = f"{n.attr}[:, :, {tokens}].flatten(1, 2)" if query else f"{n.attr}[:, {tokens}]"
            return self.draft.define(n, letters(n), code, body)
        if n.op == "features":
            return self._features(n, body)
        if n.op == "sum":
            return self._sum(n, body)
        if n.op == "concat":
            return self._concat(n, body)
        args = [self.states.value(a, body) for a in n.args if a.op != "mask"]
        if n.op == "map":
            call = "exp" if n.attr == "exp" else "reciprocal"
            return self.draft.define(n, args[0].layout, self._in_place(n, args[0], f".{call}", body), body)
        if n.op == "part":
            return self._part(n, args[0], body)
        if n.op == "contract" and len(args) < len(n.args):
            return self._masked(n, args, body)
        if n.op == "contract":
            return self._contract(n, args, body)
        raise EmitError(f"the CPU target has no code for {n} = {n.op}{n.args}")

    def _features(self, n: Node, body: Body) -> Value:
        layout = ordered(letters(n))
        owner = body.owner(n)
        if owner is not n:
            prefix = f"{body.values[owner].name}[:, :{self.draft.sizes.of(layout[0])}]"
            return self.draft.define(n, layout, prefix, body)
        self.draft.helpers |= {"products", "monomials"}
        memory = self.draft.allocate(n, layout, body)
        code = f"monomials({body.values[n.args[0]].name}, {memory}, starts[:{n.attr}], views)"
        return self.draft.define(n, layout, code, body)

    def _gradient(self, n: Node, found: Gradient, body: Body) -> Value:
        layout = ordered(letters(found.rows))
        # the gradient does not read the constant monomial: weights that differ only there serve as well
        coefficients = self.draft.serving(found.coefficients)
        memory = self.draft.allocate(n, layout, body)
        name, scaled = body.unused(f"t_{SIDES[layout[-1]]}"), False
        if found.rows in body.values:
            rows = body.values[found.rows]
        else:
            operands = []
            for a in found.rows.args:
                value = self.states.value(a, body)
                if not a.tokens and layout[0] in value.layout and not scaled:
                    # weights of a state are fewer products than weights of a tile
                    scaled = True
                    value = self.states.weigh(value, coefficients, changes(a), body)
                operands.append(value)
            rows = self._product(operands, layout, memory, name, body)
        if not scaled:
            body.lines.append(
                f"{name} = torch.mul({rows.spread(layout)}, {self.draft.table(coefficients)}[..., None], out={memory})"
            )
        target, degree = ordered(letters(n)), found.low.attr + 1
        if degree == 1:
            return self.draft.define(n, target, f"{name}[:, 1:]", body)
        self.draft.helpers.add("gradient")
        low = body.values[found.low]
        spare = self.draft.allocate(None, low.layout, body)
        self.draft.release(spare)
        return self.draft.define(n, target, f"gradient({name}, {low.name}, {spare}, d, starts[:{degree}], views)", body)

    def _sum(self, n: Node, body: Body) -> Value:
        inner = body.multiplied(n)
        if inner is not None:
            return self._multiple(n, inner, body)
        values = [self.states.value(a, body) for a in n.args]
        layout = next((v.layout for v in values if set(v.layout) == set(letters(n))), ordered(letters(n)))
        return self.draft.define(n, layout, self.states.total(n, values, layout), body)

    def _multiple(self, n: Node, inner: Node, body: Body) -> Value:
        """A multiple of a matrix product, plus one of a value that has fewer axes, in one call."""
        coefficients = dict(zip(n.args, n.attr[0], strict=True))
        operands = [self.states.value(a, body) for a in inner.args]
        layout = ordered(letters(n))
        pair = matrices(operands, layout)
        if pair is None or pair[2] != (1, 1):
            raise EmitError(f"the CPU target has no code for {n}, a multiple of {inner} = contract{inner.args}")
        memory = self.draft.allocate(n, layout, body)
        factor = self.draft.number(coefficients.pop(inner))
        if not coefficients:
            made = self.draft.define(n, layout, memory, body)
            body.lines.append(f"{made.name}.baddbmm_({pair[0]}, {pair[1]}, beta=0, alpha={factor})")
            return made
        ((added, c),) = coefficients.items()
        start, beta = self.states.value(added, body).spread(layout), self.draft.number(c)
        code = f"torch.baddbmm({start}, {pair[0]}, {pair[1]}, beta={beta}, alpha={factor}, out={memory})"
        return self.draft.define(n, layout, code, body)

    def _concat(self, n: Node, body: Body) -> Value:
        widths, constants = n.attr
        layout = letters(n)
        name = body.base(n)
        wide = next(k for k, (w, c) in enumerate(zip(widths, constants, strict=True)) if w is not None and c is None)
        columns = [column(k, wide, len(widths)) for k in range(len(widths))]
        memory = self.draft.stack(n, name, columns)
        value = self.draft.define(n, layout, f"{memory.name}[:, :{self.draft.sizes.of(layout[0])}]", body)
        pending = iter(n.args)
        for k, c in enumerate(constants):
            if c is None:
                part = self.states.value(next(pending), body)
                target = layout if k == wide else layout[:1]
                source = Value(part.name, tuple("b̂" if k == wide and x not in TOKENS else x for x in part.layout))
                body.lines.append(f"{value.name}[:, :, {columns[k]}] = {source.spread(target)}")
        return value

    def _part(self, n: Node, whole: Value, body: Body) -> Value:
        part, widths = n.attr
        wide = next((k for k, w in enumerate(widths) if w is not None), len(widths))
        axis = whole.layout.index(n.args[0].axes[-1].letter)
        dims = [":"] * (axis + 1) + [column(part, wide, len(widths))]
        kept = letters(n)
        layout = tuple(kept[-1] if k == axis else x for k, x in enumerate(whole.layout) if k != axis or part == wide)
        return self.draft.define(n, layout, f"{whole.name}[{', '.join(dims)}]", body)

    def _masked(self, n: Node, args: Sequence[Value], body: Body) -> Value:
        """Pairs without those that the mask hides, and their sum where the node has one."""
        source = next(a for a in n.args if a.op != "mask")
        if len(args) != 1 or args[0].layout != TOKENS or not set(letters(n)) <= set(TOKENS):
            raise EmitError(f"the CPU target masks scores only, not {n}")
        (value,) = args
        kept = tuple(x for x in TOKENS if x in letters(n))
        gone = [str(k + 1) for k, x in enumerate(TOKENS) if x not in kept]
        total = f".sum({', '.join(gone)})" if gone else ""
        if total and body.walk.masks is None:
            return self.draft.define(n, kept, value.name + total, body)
        if body.dies(source) or (body.walk.masks is None and source not in body.memory):
            if source in body.memory and not total:
                body.memory[n] = body.memory.pop(source)
            made = value
        else:
            memory = self.draft.allocate(None if total else n, value.layout, body)
            made = Value(body.unused("pairs") if total else body.name(n), value.layout)
            body.lines.append(f"{made.name} = {memory}.copy_({value.name})  # {self.draft.sizes.shape(made.layout)}")
            if total:
                self.draft.release(memory)
        if body.walk.masks is not None:
            body.lines.append(f"{made.name}{body.walk.masks}")
        return self.draft.define(n, kept, made.name + total, body) if total else made

    def _contract(self, n: Node, args: list[Value], body: Body) -> Value:
        result, involved = set(letters(n)), set().union(*(v.layout for v in args))
        widest = max(args, key=lambda v: len(v.layout))
        if involved == result or (
            involved == set(widest.layout) and len(args) == 2 and not matrices(args, ordered(result))
        ):
            return self._rowwise(n, args, widest, body)
        layout = ordered(result)
        memory = self.draft.allocate(n, layout, body) if large(layout) else None
        return self._product(args, layout, memory, body.name(n), body)

    def _product(self, args: Sequence[Value], layout: Layout, memory: str | None, name: str, body: Body) -> Value:
        """A matrix product, or an einsum where the axes do not lie so."""
        pair = matrices(args, layout) if len(args) == 2 else None
        made, comment = Value(name, layout), f"  # {self.draft.sizes.shape(layout)}"
        if pair is None:
            code = einsum(args, layout)
            body.lines.append(f"{name} = {code if memory is None else f'{memory}.copy_({code})'}{comment}")
        elif memory is None:
            body.lines.append(f"{name} = torch.bmm({pair[0]}, {pair[1]}){comment}")
        elif pair[2] == (1, 1):
            body.lines.append(f"{name} = torch.bmm({pair[0]}, {pair[1]}, out={memory}){comment}")
        else:
            body.lines.append(f"{name} = {memory}{comment}")
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
            return self.draft.define(n, layout, args[0].spread(space) + total, body)
        factors = [v.spread(space, copy=large(space)) for v in args]
        if not large(space):
            code = " * ".join(factors)
            return self.draft.define(n, layout, f"({code}){total}" if total else code, body)
        dying = next((a for a, v in zip(n.args, args, strict=True) if v.layout == space and body.dies(a)), None)
        if dying is not None:
            memory = body.values[dying].name
            if not total:
                body.memory[n] = body.memory.pop(dying)
        else:
            memory = self.draft.allocate(None if total else n, space, body)
            if total:
                self.draft.release(memory)
        return self.draft.define(n, layout, f"torch.mul({', '.join(factors)}, out={memory}){total}", body)

    def _in_place(self, n: Node, value: Value, call: str, body: Body) -> str:
        """An elementwise function, over its argument's memory where nobody reads that any more."""
        (source,) = n.args
        if not large(value.layout):
            return f"{value.name}{call}()"
        if body.dies(source):
            body.memory[n] = body.memory.pop(source)
            return f"{value.name}{call}_()"
        return f"torch{call}({value.name}, out={self.draft.allocate(n, value.layout, body)})"
