"""FLOPs of clustered attention by stage, as shares of exact attention's.

Exact attention has 2 n² (d + e) of them forward and 2 n² (3 d + 2 e) backward.
"""

from __future__ import annotations

from clustered.plan import Setting
from clustered.tiles import LLOYD_STEPS, LLOYD_TOKENS, POWER_STEPS, REACH, SAMPLE


def forward(n: int, d: int, e: int, tiles: tuple[int, int], executed: float, setting: Setting) -> dict[str, float]:
    """Shares of the stages of a forward pass.

    Args:
        tiles: how many tiles there are of queries and of keys.
        executed: the share of pairs of tokens in near tiles, with empty places.
    """
    a, b = tiles
    stages = {
        "grouping": grouping(n, d, d + e, setting) + 2 * n * d * (3 * d + 2 * e),
        "moments": 2 * n * (2 * d * d + d * e),
        "pseudo-keys": 2 * a * n * (2 * d + e),
        "scores": a * b * (4 * d * d + 4 * d + 4 * e),
        "far": 2 * n * b * (d + e) + 2 * a * b * (d * e + d * d) + 2 * n * (d * d + d * e),
    }
    return {name: flops / (2 * n * n * (d + e)) for name, flops in stages.items()} | {"near": executed}


def grouping(n: int, width_q: int, width_k: int, setting: Setting) -> float:
    """FLOPs of making tiles of queries and of keys from features of these widths."""
    flops = 0.0
    for width, tile in ((width_q, setting.width_q), (width_k, setting.width_k)):
        if setting.grouping == "k-means":
            count = n // tile
            flops += 2 * count * width * (n + LLOYD_STEPS * LLOYD_TOKENS * count)
            continue
        size = n
        while size > tile:
            flops += n * width * (2 + 4 * POWER_STEPS * min(SAMPLE, size) / size)
            size //= 2
        if setting.grouping == "refined tree":
            flops += (REACH - 1) * 3 * n * width
    return flops


def backward(n: int, d: int, e: int, tiles: tuple[int, int], executed: float) -> dict[str, float]:
    """Shares of the stages of the substituted gradient of order 1, without the forward pass that it begins with."""
    a, b = tiles
    far = 2 * n * b * (4 * d + 2 * e) + 2 * n * a * (6 * d + 3 * e)
    far += 4 * a * b * (d * e + d * d) + 6 * n * (d * e + d * d)
    return {"far": far / (2 * n * n * (3 * d + 2 * e)), "near": executed}
