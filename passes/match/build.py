"""The last checks of a match, the same for every spelling, and the site."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from polyattn.passes.match.axes import NotAttention
from polyattn.passes.match.context import Context
from polyattn.passes.match.owners import owners
from polyattn.passes.match.site import Operand, Site, named_shape, where

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_site(
    context: Context,
    out: fx.Node,
    path: list[fx.Node],
    q: Operand,
    k: Operand,
    v: Operand,
    batch: tuple[Any, ...] | None,
    score_batch: tuple[Any, ...] | None,
    scale: float,
    causal: bool,
    spelling: str,
    grouped: bool,
    held: tuple[fx.Node, ...] = (),
) -> Site:
    """The last checks (dtypes, regions, mutation), then the site."""
    if batch is None or score_batch is None:
        raise NotAttention("the batch axes of q, k and v do not broadcast in a way that is known when compiling", out)
    context.check_one_region([*path, out], out)
    context.check_stable(path, (q.node, k.node, v.node, *held), out)
    cast = context.autocast(out)
    dtypes = [operand.value.dtype for operand in (q, k, v)] + [out.meta["val"].dtype]
    if any(dtype not in DTYPES for dtype in dtypes):
        raise NotAttention(f"attention in {', '.join(sorted({str(d) for d in dtypes}))}", out)
    if cast is None and len(set(dtypes)) != 1:
        raise NotAttention(f"q, k, v and the output have different dtypes: {', '.join(map(str, dtypes))}", out)
    heads = batch[-1] if batch else 1
    rest = batch[:-1]
    whole = (
        rest[0]
        if len(rest) == 1
        else math.prod(rest)
        if all(isinstance(s, int) for s in rest)
        else "*".join(map(str, rest))
    )
    sizes = named_shape(
        batch=whole,
        heads=heads,
        kv_heads=k.batch[-1] if grouped else heads,
        n_q=q.tokens,
        n_k=k.tokens,
        d=q.features,
        e=v.features,
    )
    return Site(
        index=0,
        q=q,
        k=k,
        v=v,
        out=out,
        out_transposed=False,
        batch=batch,
        score_batch=score_batch,
        grouped=grouped,
        scale=scale,
        causal=causal,
        mask="causal" if causal else "none",
        where=where(out),
        spelling=spelling,
        owners=owners(q.node, k.node, context.parameters),
        shape=sizes,
        cast=cast,
    )
