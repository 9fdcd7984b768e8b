"""Triton source of one kernel: nodes of a plan become tiles, computed in the outermost block where their axes stand.

A kernel owns a block of tokens, or a block of rows of a state; its other axes are loops.  A *scope* says how axes are
bound there: to a vector of indices (an axis of the tile) or to one index (no axis of the tile).  A tile has at most two
axes, in the order tokens, features, head, value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from polyattn.codegen import spec
from polyattn.codegen.spec import FEATURES, TOKENS, WIDTHS, accumulates, is_state
from polyattn.codegen.triton.scope import Scope
from polyattn.errors import EmitError
from polyattn.rewriter.algebra.expr import Kind
from polyattn.rewriter.planning.plan import Node, walk

ORDER = (*TOKENS, *FEATURES, *WIDTHS)
VALUES = ("b", "b̂")
BLOCKS = {"i": "BLOCK_I", "j": "BLOCK_J", "a": "BLOCK_D", "b": "BLOCK_E", "b̂": "BLOCK_E"}
NAMES = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "b̂": "b"}
SIDES = {"i": ("q_base", "n_q"), "j": ("k_base", "n_k")}
INPUT_NAMES = {"D": "denominator", "B": "key_weight"}


def letters(n: Node) -> tuple[str, ...]:
    """The axes of a node in the order of tiles."""
    return tuple(sorted(spec.letters(n), key=ORDER.index))


def rank_name(letter: str) -> str:
    """The kernel's argument for the number of features of an axis: R, and R1 one degree down."""
    level = FEATURES.index(letter)
    return "R" if level == 0 else f"R{level}"


class Kernel:
    """Writes one kernel.

    Args:
        states: memory name of every state that an earlier kernel left.
    """

    def __init__(self, states: Mapping[Node, str]) -> None:
        self.states = states
        self.root = Scope(1, None)
        self.pointers: dict[str, None] = {}
        self.weights: dict[tuple[sympy.Expr, ...], str] = {}
        self.numbers: dict[sympy.Expr, int] = {}
        self.ranks: dict[str, None] = {}
        self._used: dict[str, int] = {}

    # -- names and scopes ----------------------------------------------------------------------------------------

    def name(self, base: str) -> str:
        """A name that is not used yet."""
        count = self._used[base] = self._used.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"

    def pointer(self, name: str) -> str:
        """Note that the kernel takes a pointer; returns its name."""
        self.pointers[name] = None
        return name

    def rank(self, letter: str) -> str:
        """The argument for the number of features of an axis, noted as one."""
        self.ranks[rank_name(letter)] = None
        return rank_name(letter)

    def open(self, scope: Scope, header: str | None) -> Scope:
        """A block inside ``scope``; with a header it is a loop, without one it only binds."""
        inner = Scope(scope.depth + (1 if header else 0), scope)
        if header:
            inner.lines.append("    " * scope.depth + header)
        return inner

    def close(self, inner: Scope) -> None:
        """Append the lines of a block to the one around it."""
        assert inner.parent is not None
        inner.parent.lines += inner.lines

    def home(self, n: Node, scope: Scope) -> Scope:
        """The outermost scope in which all axes of the node are bound."""
        axes = letters(n)
        at = scope
        while at.parent is not None and not any(letter in at.bindings for letter in axes):
            at = at.parent
        return at

    def axes(self, n: Node, scope: Scope) -> tuple[str, ...]:
        """The axes that the node's tile has in a scope: those that are not bound to one index."""
        return tuple(letter for letter in letters(n) if not scope.binding(letter).scalar)

    def block(self, letter: str) -> str:
        """The size of a tile along an axis, as the kernel's constant."""
        return BLOCKS.get(letter, "BLOCK_R")

    def shape(self, axes: Iterable[str]) -> str:
        """The shape of a tile as text, ``[BLOCK_J, BLOCK_R]``."""
        return "[" + ", ".join(self.block(letter) for letter in axes) + "]"

    # -- text of aligned tiles -----------------------------------------------------------------------------------

    @staticmethod
    def align(text: str, have: tuple[str, ...], want: tuple[str, ...]) -> str:
        """A tile's text broadcast to more axes."""
        if have == want or not have:
            return text
        if len(have) == 1 and len(want) == 2:
            return f"{text}[:, None]" if have[0] == want[0] else f"{text}[None, :]"
        raise EmitError(f"a tile over {have} does not broadcast to {want}")

    def vector(self, letter: str, want: tuple[str, ...], scope: Scope, ok: bool = False) -> str:
        """The index (or its bounds check) of an axis, broadcast to the axes of a tile."""
        binding = scope.binding(letter)
        text = binding.ok if ok else binding.index
        return text if binding.scalar else self.align(text, (letter,), want)

    def load(self, pointer: str, address: str, axes: tuple[str, ...], n: Node, scope: Scope, other: str) -> str:
        """A load of a tile, converted to the accumulator's dtype; ``other`` stands outside of its bounds."""
        return (
            f"tl.load({self.pointer(pointer)} + {address}, mask={self.checks(n, axes, scope)}, other={other}).to(ACC)"
        )

    def checks(self, n: Node, axes: tuple[str, ...], scope: Scope) -> str:
        """The bounds checks of a tile's axes."""
        bound = (letter for letter in letters(n) if not scope.binding(letter).scalar)
        return " & ".join(self.vector(letter, axes, scope, ok=True) for letter in bound)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def emit(self, n: Node, scope: Scope) -> str:
        """The name of the node's tile; computes it in its home scope if that has not been done."""
        home = self.home(n, scope)
        if n not in home.memo:
            text, base = self._text(n, home)
            made = self.name(base)
            home.write(f"{made} = {text}  # {self.shape(self.axes(n, home))}")
            home.memo[n] = made
        return home.memo[n]

    def _text(self, n: Node, scope: Scope) -> tuple[str, str]:
        """Expression and base name of a node in its home scope."""
        axes = self.axes(n, scope)
        if n in self.states:
            return self._state(n, axes, scope), self.states[n].lower()
        if n.op == "input":
            return self._input(n, axes, scope)
        if n.op == "features":
            return self._features(n, axes, scope)
        if n.op == "weights":
            name = self.weights.setdefault(n.attr, f"W{len(self.weights)}")
            binding = scope.binding(letters(n)[0])
            address = f"{self.pointer(name)} + head * {self.rank(letters(n)[0])} + {binding.index}"
            return f"tl.load({address}, mask={binding.ok}, other=0.0).to(ACC)", "weights"
        if n.op == "mask":
            i, j = (self.vector(letter, axes, scope) for letter in TOKENS)
            checks = " & ".join(self.vector(letter, axes, scope, ok=True) for letter in TOKENS)
            return f"(({i} >= {j}) & {checks}).to(ACC)", "near"
        if n.op == "map":
            argument = self.emit(n.args[0], scope)
            return (f"tl.exp({argument})", "exp_scores") if n.attr == "exp" else (f"1.0 / {argument}", "inverse")
        if n.op == "concat":
            return self._concat(n, axes, scope)
        if n.op == "part":
            return self._part(n, scope)
        if n.op == "sum":
            return self._sum(n, axes, scope)
        if n.op == "contract":
            return self.contract(n, scope), "pairs" if len(set(axes) & set(TOKENS)) == 2 else "rows"
        raise EmitError(f"no Triton code for {n.op} on its own")

    def _input(self, n: Node, axes: tuple[str, ...], scope: Scope) -> tuple[str, str]:
        name = INPUT_NAMES.get(n.attr, n.attr.lower())
        token = next((kind.letter for kind in n.axes if kind.token), None)
        if token is None:
            return self._stored(n, [kind.letter for kind in n.axes], n.attr, axes, scope, ""), name
        base, _ = SIDES[token]
        row = f"({base} + {self.vector(token, axes, scope)})"
        rest = [letter for letter in letters(n) if letter != token]
        address = row
        if rest:
            address = f"{row} * {'HEAD_DIM' if rest[0] == 'a' else 'VALUE_DIM'} + {self.vector(rest[0], axes, scope)}"
        return self.load(n.attr, address, axes, n, scope, "1.0" if n.attr == "D" else "0.0"), name

    def _state(self, n: Node, axes: tuple[str, ...], scope: Scope) -> str:
        return self._stored(n, letters(n), self.states[n], axes, scope, "chunk" if n.scanned else "")

    def _stored(
        self, n: Node, order: Iterable[str], memory: str, axes: tuple[str, ...], scope: Scope, chunk: str
    ) -> str:
        return self.load(memory, self.state_address(order, axes, scope, chunk), axes, n, scope, "0.0")

    def state_address(self, order: Iterable[str], axes: tuple[str, ...], scope: Scope, chunk: str) -> str:
        """Where an element of a state lies: [heads, (chunks,) axes in the given order], contiguous."""
        sizes = {"a": "HEAD_DIM", "b": "VALUE_DIM", "b̂": "(VALUE_DIM + 1)"}
        address = f"(head * chunks + {chunk})" if chunk else "head"
        for letter in order:
            size = sizes[letter] if letter in sizes else self.rank(letter)
            address = f"({address} * {size} + {self.vector(letter, axes, scope)})"
        return address

    def _features(self, n: Node, axes: tuple[str, ...], scope: Scope) -> tuple[str, str]:
        """Monomials: a product of columns of [x, 1], one per degree; the columns stand in a table."""
        source = n.args[0]
        if source.op != "input":
            raise EmitError("features of anything but an input have no Triton code yet")
        token, feature = letters(n)
        base, _ = SIDES[token]
        degree = n.attr
        row, ok = self.vector(token, axes, scope), self.vector(token, axes, scope, ok=True)
        factors = []
        for slot in range(degree):
            column = self.align(self.column(feature, degree, slot, scope), (feature,), axes)
            address = f"({base} + {row}) * HEAD_DIM + {column}"
            factor = self.name(f"{source.attr.lower()}_{slot}")
            load = f"tl.load({self.pointer(source.attr)} + {address}, mask={ok} & ({column} < HEAD_DIM), other=1.0)"
            scope.write(f"{factor} = {load}.to(ACC)  # {self.shape(axes)}")
            factors.append(factor)
        return " * ".join(factors), f"phi_{source.attr.lower()}"

    def column(self, feature: str, degree: int, slot: int, scope: Scope) -> str:
        """Per feature, the variable in one slot of its monomial (HEAD_DIM stands for 1)."""
        at = scope
        while feature not in at.bindings and at.parent is not None:
            at = at.parent
        binding = at.bindings[feature]
        key, known = f"column {feature} {degree} {slot}", at.loaded
        if key not in known:
            table, size = self.pointer(f"COLUMNS_{degree}"), self.rank(feature)
            known[key] = self.name(f"column_{slot}")
            address = f"{table} + {slot} * {size} + {binding.index}" if slot else f"{table} + {binding.index}"
            at.write(f"{known[key]} = tl.load({address}, mask={binding.ok}, other=HEAD_DIM)  # {self.shape([feature])}")
        return known[key]

    def number(self, c: sympy.Expr) -> str:
        """A coefficient: a literal, or loaded once from the table of numbers."""
        if not c.free_symbols:
            return repr(float(c))
        place, key = self.numbers.setdefault(c, len(self.numbers)), f"number {c}"
        known = self.root.loaded
        if key not in known:
            known[key] = self.name("factor")
            self.root.write(f"{known[key]} = tl.load({self.pointer('NUMBERS')} + {place})  # {c}")
        return known[key]

    def _concat(self, n: Node, axes: tuple[str, ...], scope: Scope) -> tuple[str, str]:
        """[V, 1] or [G, δ] side by side: the last column is a constant or one number per token."""
        widths, constants = n.attr
        if len(widths) != 2 or constants[0] is not None or not isinstance(widths[0], Kind):
            raise EmitError("a stack of more than one matrix and one column has no Triton code yet")
        main = n.args[0]
        token = next(kind.letter for kind in n.axes if kind.token)
        last = self.vector("b̂", axes, scope)
        if constants[1] is not None:
            ok = self.vector(token, axes, scope, ok=True)
            column = f"tl.where({ok}, {self.number(sympy.sympify(constants[1]))}, 0.0)"
        else:
            argument = n.args[1]
            column = self.align(self.emit(argument, scope), self.axes(argument, scope), axes)
        text = self.emit(main, scope)
        name = f"{main.attr.lower()}_hat" if main.op == "input" else "g_hat"
        return f"tl.where({last} == VALUE_DIM, {column}, {text})", name

    def _part(self, n: Node, scope: Scope) -> tuple[str, str]:
        part, widths = n.attr
        if len(widths) != 2:
            raise EmitError("a part of more than one matrix and one column has no Triton code yet")
        stacked = n.args[0]
        text = self.emit(stacked, scope)
        axes = self.axes(stacked, scope)
        last = self.vector("b̂", axes, scope)
        if part == 0:
            return f"tl.where({last} < VALUE_DIM, {text}, 0.0)", "numerator"
        return f"tl.sum(tl.where({last} == VALUE_DIM, {text}, 0.0), axis={axes.index('b̂')})", "last_column"

    def _sum(self, n: Node, axes: tuple[str, ...], scope: Scope) -> tuple[str, str]:
        coefficients, _ = n.attr
        parts = []
        for c, argument in zip(coefficients, n.args, strict=True):
            text = self.align(self.emit(argument, scope), self.axes(argument, scope), axes)
            parts.append(text if c == 1 else f"{self.number(sympy.sympify(c))} * {text}")
        return " + ".join(parts), "scores" if len(set(axes) & set(TOKENS)) == 2 else "total"

    # -- contractions --------------------------------------------------------------------------------------------

    def contract(self, n: Node, scope: Scope, accumulator: str | None = None) -> str:
        """A product of tiles that are bound here, summed over what the result does not have."""
        check_pattern(n)
        want = self.axes(n, scope)
        tiles = [(self.emit(a, scope), self.axes(a, scope)) for a in n.args]
        made = self.product(tiles, want, accumulator)
        return made if accumulator is None or made.startswith("tl.dot") else f"{accumulator} + {made}"

    def product(self, tiles: list[tuple[str, tuple[str, ...]]], want: tuple[str, ...], accumulator: str | None) -> str:
        """A product of tiles as text, summed over the axes that ``want`` does not have, added to an accumulator."""
        reduced = {letter for _, axes in tiles for letter in axes} - set(want)
        if len(tiles) == 2 and all(len(axes) == 2 for _, axes in tiles) and len(reduced) == 1 and len(want) == 2:
            (inner,) = reduced
            first, second = sorted(tiles, key=lambda tile: want[0] not in tile[1])
            if want[0] in first[1] and want[1] in second[1] and inner in first[1] and inner in second[1]:
                left = first[0] if first[1] == (want[0], inner) else f"tl.trans({first[0]})"
                right = second[0] if second[1] == (inner, want[1]) else f"tl.trans({second[0]})"
                acc = f"acc={accumulator}, " if accumulator else ""
                return f'tl.dot({left}, {right}, {acc}input_precision="ieee", out_dtype=ACC)'
        union = tuple(sorted({letter for _, axes in tiles for letter in axes}, key=ORDER.index))
        if len(union) > 2 or len(reduced) > 1:
            raise EmitError(f"no Triton product of tiles over {[axes for _, axes in tiles]} to {want}")
        text = " * ".join(self.align(text, axes, union) for text, axes in tiles)
        for letter in reduced:
            text = f"tl.sum({text}, axis={union.index(letter)})"
        return text


def check_pattern(n: Node) -> None:
    """A contraction shares indices exactly where its arguments have axes of one kind.

    Raises:
        EmitError: two indices of one kind in one product.
    """
    patterns, result = n.attr
    names: dict[str, int] = {}
    for axes, pattern in [*((a.axes, p) for a, p in zip(n.args, patterns, strict=True)), (n.axes, result)]:
        for kind, number in zip(axes, pattern, strict=True):
            if names.setdefault(kind.letter, number) != number:
                raise EmitError(f"two indices of the kind {kind.letter} in one product have no Triton code yet")


def reduced_letters(n: Node) -> set[str]:
    """Kinds of axes that a contraction sums over."""
    return {kind.letter for a in n.args for kind in a.axes} - {kind.letter for kind in n.axes}


def looped(n: Node, own: str) -> str | None:
    """The axis of the loop that a token-level contraction needs: features, the other token, or None."""
    if n.op != "contract" or is_state(n) or accumulates(n):
        return None
    reduced = reduced_letters(n)
    tokens = [letter for letter in reduced if letter in TOKENS and letter != own]
    if tokens:
        return tokens[0]
    if any(a.op == "gather" for a in n.args):
        return "α"
    features = [letter for letter in reduced if letter in FEATURES]
    if features:
        return features[0]
    wide = [a for a in n.args if len(a.axes) == 3 and a.op == "contract"]
    if wide and reduced & set(VALUES):
        inner = [letter for letter in reduced_letters(wide[0]) if letter in FEATURES]
        return inner[0] if inner else None
    return None


def reductions(outputs: Iterable[Node], own: str, states: Iterable[Node]) -> list[tuple[str, list[Node]]]:
    """The loops of a token kernel in order: the axis of each and the contractions that share it."""
    levels: dict[Node, int] = {}
    groups: dict[tuple[int, str], list[Node]] = {}
    known = set(states)
    for n in walk(outputs, known):
        level = max((levels.get(a, 0) for a in n.args), default=0)
        axis = looped(n, own)
        if axis is not None and len(n.axes) < 3:  # else it is summed in the loop of the contraction that uses it
            level += 1
            groups.setdefault((level, axis), []).append(n)
        levels[n] = level
    return [(axis, found) for (_, axis), found in sorted(groups.items(), key=lambda item: item[0])]
