"""02: a GPT-style model that knows nothing of polyattn, compiled, explained, trained, compared with eager.

python examples/02_gpt.py [--tokens 512] [--steps 10] [--inner inductor|eager]

It answers three questions. What became of the attention? (``polyattn.explain``.) Are the gradients those of exact
attention? (Each parameter's, beside eager's.) Does it train? (The losses of a few steps, with both.)
``policy="low_rank"`` is forced because at so few tokens exact attention is cheaper, and ``auto`` would keep it; the
chunk is short, because inside a chunk a causal site is exact, and one chunk over all tokens would approximate nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import gpt_model
import stdlib_text
import torch

import polyattn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what it prints: the report, the relative error of every parameter's gradient, both lists of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--inner", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    options = {"policy": "low_rank", "causal_chunk": max(1, chosen.tokens // 4), "inner": chosen.inner}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        model = gpt_model.GPT(gpt_model.Config(context=chosen.tokens))
    batches = list(stdlib_text.batches(stdlib_text.read(500_000), chosen.tokens, chosen.steps, chosen.seed))

    print("What becomes of its attention\n")
    report = polyattn.explain(model, batches[0][0], options={**options, "inner": "eager"})
    print(report)

    print("\nThe gradients of its parameters, compiled against eager (relative, Frobenius)\n")
    eager_model, compiled_model = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(compiled_model, backend="polyattn", options=options)
    inputs, targets = batches[0]
    gpt_model.loss_of(eager_model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    gpt_model.loss_of(compiled(inputs), targets).backward()  # type: ignore[no-untyped-call]
    errors = gradient_errors(compiled_model, eager_model)
    for name, error in errors.items():
        print(f"  {error:.1e}  {name}")

    print("\nTraining, in nats per byte\n\n  step  polyattn  eager")
    losses = {
        "polyattn": train(compiled, compiled_model, batches),
        "eager": train(eager_model, eager_model, batches),
    }
    for step, (ours, exact) in enumerate(zip(losses["polyattn"], losses["eager"], strict=True)):
        print(f"  {step:>4}  {ours:>8.4f}  {exact:.4f}")
    return {"report": report, "gradient_errors": errors, "losses": losses}


def gradient_errors(model: torch.nn.Module, reference: torch.nn.Module) -> dict[str, float]:
    """``|g - g_reference| / |g_reference|`` of every parameter, by name."""
    errors = {}
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, f"{name} got no gradient"
        assert expected.grad is not None
        errors[name] = float((parameter.grad - expected.grad).norm() / expected.grad.norm())
    return errors


def train(run: Any, model: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """One AdamW step per batch; ``run`` is the model or its compiled form."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = gpt_model.loss_of(run(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
