"""What the report shows of a site is what ran: its graphs, and the operations that it counts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rules import kernels, mask_of
from torch import nn

import polyattn
from polyattn.passes.derive.derive import derive
from polyattn.passes.derive.forms import FORMS, softmax
from polyattn.passes.derive.inspection import derivation
from polyattn.passes.derive.kernels import exact_plan
from polyattn.passes.derive.log import Log
from polyattn.rewriter.algebra import expr as ir
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import CAUSAL, NONE
from polyattn.rewriter.notation import printer
from polyattn.rewriter.planning.plan import flops


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=0.9)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_graphs_of_a_report_compute_what_ran(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 1, 70, 4, generator=generator) for _ in range(4))
    options = {"policy": "low_rank", "causal_chunk": 16, "audit_rows": 8}
    (site,) = polyattn.explain(Attention(causal), q, k, v, options=options).sites
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ran = polyattn.attention(*inputs, causal=causal, scale=0.9, options=options)
    gradients = torch.autograd.grad(ran, inputs, g)
    with torch.no_grad():
        assert site.forward_graph is not None
        assert site.backward_graph is not None
        out, denominators = site.forward_graph(q, k[0], v[0])
        shown = site.backward_graph(q, k[0], v[0], g, out, denominators)
    torch.testing.assert_close(out.view_as(ran), ran.detach(), rtol=0, atol=1e-5)
    for x, y in zip(shown, gradients, strict=True):
        torch.testing.assert_close(x.view_as(y), y, rtol=0, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("gradient", ["consistent", "substituted"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flops_after_are_those_of_every_tile_that_runs(causal: bool, gradient: str) -> None:
    from polyattn.runtime.policy import symbolic_costs

    made = kernels(causal, 2, gradient)
    specs = (made.forward, made.backward(("dQ", "dK", "dV")))
    ran = sum(flops(n, int(causal)) for spec in specs for loop in spec.loops for n in (*loop.tiles, *loop.accumulate))
    sizes = {ir.N_Q: 4096, ir.N_K: 4096, ir.D: 32, ir.E: 32, ir.CHUNK: 512, ir.R: 561, ir.R1: 33}
    symbolic = symbolic_costs(softmax(mask_of(causal)), PolynomialRule(2), gradient)[1]
    assert symbolic.subs(sizes) == ran.subs(sizes)
    assert symbolic.subs(sizes) >= made.plan.cost().subs(sizes)


def test_flops_before_are_those_of_flash_attention() -> None:
    """4 n² d forward and 10 n² d backward, which recomputes the scores (math.md §7), half of it under a causal mask."""
    from polyattn.runtime.policy import symbolic_costs

    for causal, share in ((False, 1), (True, 2)):
        before = symbolic_costs(softmax(mask_of(causal)), PolynomialRule(2), "consistent")[0]
        before = before.subs({ir.N_K: ir.N_Q, ir.E: ir.D})
        assert before.expand().coeff(ir.N_Q, 2).coeff(ir.D, 1) * share == 14
    assert exact_plan(softmax(NONE)).token_degree() == 2


# -- the log of a derivation -----------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
SHAPE = {"n_q": 65536, "n_k": 65536, "d": 32, "e": 32, "chunk": 512}
LOGS = [
    ("softmax", "consistent"),
    ("softmax", "substituted"),
    ("causal_softmax", "consistent"),
    ("paper", "consistent"),
    ("paper", "substituted"),
]


def width(line: str) -> int:
    return sum(not unicodedata.combining(ch) for ch in line)


@pytest.mark.parametrize(("form", "gradient"), LOGS)
def test_the_log_reads_as_its_golden_file(golden: Callable[..., None], form: str, gradient: str) -> None:
    text = str(derivation(FORMS[form], PolynomialRule(2), gradient))
    assert max(map(width, text.splitlines())) <= 120
    golden(f"derivation/{form}-2-{gradient}.txt", text)


def test_the_document_shows_the_log(golden: Callable[..., None]) -> None:
    """docs/derivation.md; ``make golden`` writes it."""
    made = derivation(softmax(NONE), PolynomialRule(2), gradient="consistent", shape=SHAPE)
    final = printer.latex(made.steps[-1].program).replace("\n", " \\\\\n")
    text = f"""# A derivation, step by step

Written by `make golden` from `polyattn.passes.derive.inspection.derivation(softmax(NONE),
PolynomialRule(2), "consistent", shape=...)`; a report shows the same of a site that is low rank. The steps are those of
`passes/derive/derive.py`, the formulas those of `rewriter/notation/printer.py`, the FLOPs and the order of contraction
those of the planner (`rewriter/planning/order.py`, `rewriter/notation/recipe.py`).
`tests/passes/derive/test_inspection.py` keeps this page true.

Where the cost falls: the exact form is n² d. *kronecker* makes it linear in n: all that stands under one sum becomes
one wide matrix, and the state of dQ and dK holds features of degree g − 1, values and keys, r′ × (e+1) × d. *compress*
finds that a feature of degree g − 1 times a key is a feature of degree g: r′ d becomes r, and the state is the
r × (e+1) that the forward has already. Put into the exact gradient (substituted), the features have degree g
themselves: nothing is there to compress, and the state is r × (e+1) × d.

```text
{made}
```

The result in LaTeX (`Derivation.latex()` has every step):

```math
\\begin{{gathered}}
{final}
\\end{{gathered}}
```
"""
    golden("derivation.md", text, folder=ROOT / "docs")


def test_the_log_says_where_the_factor_d_comes_from() -> None:
    text = str(derivation(softmax(NONE), PolynomialRule(2), gradient="substituted"))
    for line in (
        "consistent: S₁ = Φ₂(K)ᵀ V̂, r × (e+1)",
        "substituted: S₂ = Φ₂(K)ᵀ (K ⊘ V̂), r × d × (e+1)",
        "consistent backward   8 n r (e+1) + …",
        "substituted backward  8 n r (e+1) d + …",
        "substituted / consistent backward, leading terms in r: d",
    ):
        assert line in text


def test_costs_of_the_steps_fall_from_n_squared_to_n_r() -> None:
    text = str(derivation(softmax(NONE), PolynomialRule(2), gradient="consistent"))
    costs = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("   FLOPs of")]
    assert costs[0] == "2 n² (e+1) + 2 n² d + …   (n × n matrices: two token axes remain)"
    assert all("n²" in cost for cost in costs[:5])
    assert costs[5] == costs[6] == "8 n r′ (e+1) d + 8 n r e + …"
    assert costs[8] == "12 n r (e+1) + …"
    assert text.count("no order is linear in n yet: p(S) has no place in a plan") == 2


def test_a_program_without_an_order_is_said_to_have_none() -> None:
    """Under M_far exp(S) cannot be summed as it runs; the log gives the reason and the cost of n × n matrices."""
    text = str(derivation(softmax(CAUSAL), PolynomialRule(2), gradient="consistent"))
    assert "(M_far[i,j], V[j,b], A[i,j]) keeps the running sum under M_far apart" in text


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_a_log(name: str) -> None:
    for degree, gradient in ((1, "consistent"), (3, "substituted")):
        lines = str(derivation(FORMS[name], PolynomialRule(degree), gradient)).splitlines()
        assert max(map(width, lines)) <= 120
        assert sum(line.startswith("   FLOPs") for line in lines) == len(
            derive(FORMS[name], PolynomialRule(degree), gradient)
        )


def test_a_shape_adds_numbers() -> None:
    text = str(derivation(softmax(NONE), PolynomialRule(2), gradient="consistent", shape=SHAPE))
    assert "in numbers, n_q = 65536, n_k = 65536, d = 32, e = 32, r = 561, r′ = 33" in text
    n, r, w, r1, d = 65536, 561, 33, 33, 32
    total = n * (8 * r * w + 4 * r1 * d + 3 * 32 + 4 * r1 + 2) + r * w
    assert f"consistent backward   {total:.3e}" in text


def test_a_log_takes_seconds_and_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = derivation(softmax(CAUSAL), PolynomialRule(2), gradient="consistent")
    start = time.perf_counter()
    str(made)
    assert time.perf_counter() - start < 10  # about one second on an idle machine
    monkeypatch.setattr(Log, "write", lambda *args: pytest.fail("nobody asked for the log"))
    derivation(softmax(CAUSAL), PolynomialRule(3), gradient="consistent")


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_log_does_not_depend_on_what_was_derived_before(hash_seed: str) -> None:
    """Nodes of plans are shared and numbered in a process; names and order in the log are not."""
    before = """
from polyattn.passes.derive.kernels import kernels
for form, degree, gradient in (("paper", 3, "substituted"), ("causal_softmax", 1, "consistent")):
    str(derivation(FORMS[form], PolynomialRule(degree), gradient))
kernels(softmax(CAUSAL), PolynomialRule(2), "substituted").backward(("dV", "dK", "dQ"))
"""
    program = f"""
import hashlib
from polyattn.passes.derive.forms import FORMS, softmax
from polyattn.passes.derive.inspection import derivation
from polyattn.rewriter.families.polynomial.rule import PolynomialRule
from polyattn.rewriter.masks.mask import CAUSAL
{before if hash_seed == "1" else ""}
for form, gradient in (("paper", "substituted"), ("causal_softmax", "consistent"), ("softmax", "consistent")):
    print(hashlib.sha256(str(derivation(FORMS[form], PolynomialRule(2), gradient)).encode()).hexdigest())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = [
        hashlib.sha256(str(derivation(FORMS[form], PolynomialRule(2), gradient)).encode()).hexdigest()
        for form, gradient in (("softmax", "consistent"), ("causal_softmax", "consistent"), ("paper", "substituted"))
    ]
    assert ran.stdout.split() == wanted[::-1]


def test_latex_has_every_step_and_renders() -> None:
    mathtext = pytest.importorskip("matplotlib.mathtext")
    made = derivation(softmax(CAUSAL), PolynomialRule(2), gradient="consistent")
    lines = made.latex().splitlines()
    assert [line for line in lines if line.startswith("%")] == [
        f"% {number}. {step.rule}: {step.note}" for number, step in enumerate(made.steps, 1)
    ]
    parser = mathtext.MathTextParser("path")
    for line in dict.fromkeys(line for line in lines if not line.startswith("%")):
        parser.parse("$" + line.removeprefix(r"\[ ").removesuffix(r" \]") + "$")
