"""Programs in tiles: the specification and the emitted CPU code against the expansion written out, with autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiled import Case, dense

from polyattn.codegen import targets
from polyattn.codegen.cpu.target import CPU
from polyattn.codegen.cpu.tiled import torch_text
from polyattn.codegen.phases import schedule_tiles
from polyattn.codegen.reference import REFERENCE
from polyattn.codegen.target import Target
from polyattn.codegen.triton.target import TRITON
from polyattn.errors import ScheduleError
from polyattn.passes.derive.forms import softmax
from polyattn.passes.derive.inspection import derivation
from polyattn.passes.derive.kernels import Kernels, kernels
from polyattn.rewriter.algebra.monomials import full
from polyattn.rewriter.families.clustered.rule import ClusteredRule
from polyattn.rewriter.masks.mask import CAUSAL_NEAR_TILES, NEAR_TILES, Mask
from polyattn.rewriter.planning.plan import walk

GRADIENTS = ("dQ", "dK", "dV")


def made(order: int, weighted: bool = False) -> Kernels:
    return kernels(softmax(NEAR_TILES, weighted), ClusteredRule(order), "consistent")


def run(target: Target, order: int, case: Case, g: torch.Tensor, weighted: bool, block: int) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    (h, a, t_q), (_, b, t_k) = case.q.shape[:3], case.k.shape[:3]
    lse = case.lse
    inputs = {"Q": case.q, "K": case.k, "V": case.v, "FLOOR": torch.full((h, a), 1e-300, dtype=torch.float64)}
    for name, shape in {"W_Q": (h, a, t_q), "W_K": (h, b, t_k)}.items():
        inputs[name] = torch.full(shape, 1 / shape[2], dtype=torch.float64)
    if weighted:
        inputs["LOG_B"] = torch.zeros(h, b, t_k, dtype=torch.float64)
    seen: list[set[str]] = []

    def choose(head: int, tiles: slice, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(set(values))
        near = case.near[head, tiles]
        return {"M_near": near, "M_far": ~near, "SHIFT": lse[head, tiles], "TOP": lse[head, tiles, 0]}

    specs, basis, scalars = made(order, weighted), full(case.q.shape[-1], 0), {"s": case.scale}
    out = target.run(specs.forward, inputs, scalars, basis, block, choose)
    read = {**inputs, "G": g, "O": out["O"], "D": out["D"]}
    gradients = target.run(specs.backward(GRADIENTS), read, scalars, basis, block, choose)
    assert all(names == {"MU", "KBAR", "CK", "DP", "NP"} for names in seen)
    return {"O": out["O"], **gradients}


def wanted(order: int, case: Case, g: torch.Tensor) -> dict[str, torch.Tensor]:
    operands = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = dense(case, order, *operands)
    return {"O": out.detach(), **dict(zip(GRADIENTS, torch.autograd.grad(out, operands, g), strict=True))}


@settings(max_examples=25, deadline=None)
@given(
    order=st.sampled_from([0, 1, 2]),
    weighted=st.booleans(),
    target=st.sampled_from([CPU, REFERENCE]),
    sizes=st.tuples(*[st.integers(1, high) for high in (2, 5, 4, 5, 4, 4, 4)]),
    block=st.integers(1, 6),
)
def test_any_size_in_any_target(order: int, weighted: bool, target: Target, sizes: tuple[int, ...], block: int) -> None:
    case = Case.of(*sizes)
    g = torch.randn(*case.q.shape[:3], case.v.shape[-1], generator=torch.Generator().manual_seed(1)).double()
    found, expected = run(target, order, case, g, weighted, block), wanted(order, case, g)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-11, msg=name)


def test_all_pairs_near_is_exact_attention() -> None:
    case = Case.of(2, 3, 4, 3, 5, 4, 3)
    case.near[:] = True
    g = torch.randn(*case.q.shape[:3], 3, dtype=torch.float64)
    out = run(CPU, 1, case, g, False, 2)["O"]
    q, k, v = case.q.flatten(1, 2), case.k.flatten(1, 2), case.v.flatten(1, 2)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.scale)
    torch.testing.assert_close(out.flatten(1, 2), exact)


def test_a_backward_computes_what_is_wanted_alone() -> None:
    """A gradient that nobody wants costs nothing."""
    specs = made(1)
    few, whole = specs.backward(("dQ",)), specs.backward(GRADIENTS)
    numbers = {"n_q": 4096, "n_k": 4096, "d": 32, "e": 32, "T_q": 64, "T_k": 64, "ν": 0.1}
    costs = [float(spec.cost().subs({s: numbers[s.name] for s in spec.cost().free_symbols})) for spec in (few, whole)]
    assert costs[0] < 0.7 * costs[1]
    assert [name for loop in few.loops for name, _ in loop.stores] == ["dQ"]


def test_forward_and_gradient_cost_no_factor_d_per_pair_of_tiles() -> None:
    """No value has two axes of columns and both tiles: the moments of pairs are pooled."""
    for n in walk(made(1).plan.outputs.values()):
        letters = [kind.letter for kind in n.axes]
        assert not ({"I", "J"} <= set(letters) and sum(x in "ab" for x in letters) == 2), n


def test_the_gradient_costs_at_most_twice_the_forward() -> None:
    specs = made(1)
    numbers = {"n_q": 16384, "n_k": 16384, "d": 32, "e": 32, "T_q": 64, "T_k": 64, "ν": 0.125}

    def cost(x: Any) -> float:
        return float(x.subs({s: numbers[s.name] for s in x.free_symbols}))

    forward = cost(specs.plan.cost(["O"]))
    backward = cost(specs.plan.cost(["dQ", "dK", "dV"], walk([specs.plan.outputs["O"]])))
    assert backward <= 2 * forward


def test_triton_says_that_it_has_no_code() -> None:
    assert TRITON.unsupported(made(1).forward) == "programs in tiles have no Triton code yet"
    assert targets.sources(made(1).forward)["triton"].startswith("# no code for this target")


def test_pairs_of_far_tiles_are_refused() -> None:
    """A sum over places of both sides without a mask of near tiles would be all of exact attention."""
    specs = made(1)
    names = dict(specs.forward.names)
    outputs = {"SN": next(n for n in walk([names["PN"]]) if n.op == "map" and n.attr == "exp")}
    from polyattn.rewriter.planning.plan import node

    (pairs,) = outputs.values()
    lost = node("contract", (pairs,), pairs.axes[:2], (((0, 1, 2, 3),), (0, 1)))
    with pytest.raises(ScheduleError, match="no mask of near tiles"):
        schedule_tiles("forward", {"D": lost}, NEAR_TILES, ClusteredRule(1), names)


@pytest.mark.golden
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_emitted_code(golden: Callable[..., None], what: str) -> None:
    specs = made(1)
    spec = specs.forward if what == "forward" else specs.backward(GRADIENTS)
    golden(f"cpu/clustered_{what}.py", CPU.emit(spec))
    golden(f"cpu/clustered_{what}_torch.py", torch_text(spec))


@pytest.mark.golden
@pytest.mark.parametrize("mask", [NEAR_TILES, CAUSAL_NEAR_TILES], ids=["", "causal_"])
def test_the_log_of_the_derivation(golden: Callable[..., None], mask: Mask) -> None:
    shape = {"n_q": 16384, "n_k": 16384, "d": 32, "e": 32}
    name = "causal_" if mask.hides else ""
    golden(f"derivation/{name}clustered.txt", str(derivation(softmax(mask), ClusteredRule(1), "consistent", shape)))


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_blocks_under_a_causal_mask_have_the_code_of_a_call_without_one(what: str) -> None:
    specs = [kernels(softmax(mask), ClusteredRule(1), "consistent") for mask in (NEAR_TILES, CAUSAL_NEAR_TILES)]
    texts = [CPU.emit(spec.forward if what == "forward" else spec.backward(GRADIENTS)) for spec in specs]
    assert texts[0].splitlines()[1:] == texts[1].splitlines()[1:]
