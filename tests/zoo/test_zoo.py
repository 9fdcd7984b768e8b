"""Every attention of real models is found, and what replaces it computes the same values and gradients."""

from __future__ import annotations

import importlib.util
from typing import Any

import count
import measure
import models
import page
import pytest
import run
import torch
import torch.nn.functional as F
from rows import COLUMNS, MODES, Row

import polyattn

SHORT = [
    ("bert", "eager", "inference"),
    ("bert", "eager", "training"),
    ("gpt2", "eager", "training"),
    ("gpt_neo", "eager", "inference"),
    ("bloom", "eager", "training"),
    ("llama", "eager", "training"),
    ("llama, padded", "sdpa", "training"),
    ("qwen3", "sdpa", "inference"),
    ("gemma2", "eager", "training"),
    ("t5", "eager", "training"),
    ("whisper", "eager", "inference"),
    ("vit", "eager", "training"),
    ("swin", "eager", "inference"),
    ("segformer", "eager", "training"),
    ("deberta-v2", "eager", "training"),
]
"""The rows that are checked whenever transformers is installed, here and against docs/zoo.md."""

REFUSED = {
    "vit-pytorch, deepvit (talking heads)": "heads|permuted",
    "vit-pytorch, cait (talking heads)": "heads|permuted",
    "timm, cait": "heads|permuted",
    "nn.MultiheadAttention, weights": "used elsewhere",
    "nn.MultiheadAttention, weights, padding": "used elsewhere",
    "nn.MultiheadAttention, weights, attn_mask": "used elsewhere",
}
"""Models that are not softmax attention as torch's fused kernels know it, and what their refusals must say."""

UNSEEN = {"nn.Transformer, without tgt_is_causal"}
"""Models whose attention stock Dynamo puts into no graph."""


def check(row: Row) -> None:
    __tracebackhide__ = True
    if row.model in REFUSED and row.refusals:
        assert all(any(word in r["reason"] for word in REFUSED[row.model].split("|")) for r in row.refusals)
        row.refusals, row.sites = [], row.sites + row.refused
    if row.model in UNSEEN:
        assert row.captured == 0
        row.executed = 0
    assert row.complete, page.table_row(row)


@pytest.mark.timeout(300)
def test_attention_of_a_few_models_is_found_and_equal() -> None:
    pytest.importorskip("transformers")
    rows = run.start(SHORT)
    assert len(rows) == len(SHORT)
    for row in rows:
        check(row)
    text = (run.ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    kept = {tuple(cells[:3]): cells[3:6] for cells in map(_cells, text.splitlines()) if len(cells) == len(COLUMNS)}
    now = {(row.model, row.implementation, row.mode): _cells(page.table_row(row))[3:6] for row in rows}
    assert now == {key: kept[key] for key in now}, "docs/zoo.md says otherwise: run `make zoo`"


PADDED = {
    ("bert", "eager"): "key padding",
    ("bert", "sdpa"): "key padding",
    ("deberta-v2", "eager"): "key padding",
    ("gpt2, padded", "sdpa"): "causal + key padding",
    ("llama, padded", "eager"): "causal + key padding",
    ("llama, padded", "sdpa"): "causal + key padding",
    ("nn.MultiheadAttention, no weights, padding", "eager"): "key padding",
    ("nn.MultiheadAttention, no weights, padding, attn_mask", "eager"): "causal + key padding",
}
"""Models with padded batches, and which keys their queries see."""


@pytest.mark.parametrize(("name", "implementation"), PADDED)
def test_padded_batches_keep_low_rank(name: str, implementation: str) -> None:
    """Equal to eager for small logits: the weights of the projections of queries are made small."""
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    polyattn.reset()
    model, args, kwargs = models.build(name, implementation)
    model.eval()
    with torch.no_grad():
        for named, weight in model.named_parameters():
            if "query" in named or "q_proj" in named or "in_proj" in named:
                weight *= 0.1
        options = {"policy": "low_rank", "audit_rows": 0, "degree": 4, "inner": "eager"}
        got = torch.compile(model, backend="polyattn", options=options)(*args, **kwargs)
        want = model(*args, **kwargs)
    tensors = [torch.utils._pytree.tree_leaves(x)[0] for x in (got, want)]
    assert measure.relative(*tensors) < 1e-3
    sites = [site for report in polyattn.reports() for site in report.sites]
    assert {(site.verdict, site.seen) for site in sites} == {("low_rank", PADDED[name, implementation])}


def _cells(line: str) -> list[str]:
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(models.ZOO))
def test_every_attention_is_found_and_equal(name: str) -> None:
    entry = models.ZOO[name]
    if importlib.util.find_spec(entry.package) is None:
        pytest.skip(f"{entry.package} is not installed: pip install -e '.[zoo]'")
    rows = run.start(run.every_row(entry))
    assert len(rows) == len(entry.implementations) * len(MODES)
    for row in rows:
        check(row)


def executed(function: Any, *args: Any) -> int:
    with count.AttentionCounter() as counter:
        function(*args)
    return int(counter.count)


QKV = [torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.mark.parametrize(
    ("spelling", "number"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 1),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(5, 5, requires_grad=True)), 1),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1),
        (lambda q, k, v: torch.einsum("bhij,bhjd->bihd", (q @ k.mT).softmax(-1).to(torch.float64), v.double()), 1),
        (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5) @ v, 1),
        (lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w @ q), 1),
        (lambda q, k, v: ((q @ k.mT).softmax(-1) @ v, (k @ q.mT).softmax(-1) @ v), 2),
        (lambda q, k, v: (q @ k.mT).softmax(-1), 0),
        (lambda q, k, v: (q * v.softmax(-2)[..., :1]) @ k.mT, 0),
        (lambda q, k, v: (q @ k.mT).log_softmax(-1) @ v, 0),
    ],
    ids=[
        "sdpa",
        "sdpa in parts",
        "by hand",
        "einsum and cast",
        "dropout",
        "two products",
        "two",
        "none",
        "gate",
        "log",
    ],
)
def test_the_count_from_outside(spelling: Any, number: int) -> None:
    assert executed(spelling, *QKV) == number


def test_the_comparison_sees_nan_and_scale() -> None:
    wanted = torch.tensor([1.0, float("nan"), 4.0])
    assert measure.relative(wanted, wanted) == 0
    assert measure.relative(torch.tensor([1.0, 0.0, 4.0]), wanted) == float("inf")
    assert measure.relative(torch.tensor([2.0, float("nan"), 4.0]), wanted) == 0.25
