"""forward of attention, clustered, order 1, with exact pairs of tiles: O, D.

Tokens are in tiles: queries [H, A, T_q, ·], keys and values [H, B, T_k, ·]; inputs are FLOOR, K, Q, V, W_K, W_Q.
choose(head, tiles, values) says which pairs of tiles are near, and yields SHIFT, TOP where they are no inputs.
SHIFT and W_Q [H, I, T_q], TOP and FLOOR [H, I], W_K and LOG_B [H, J, T_k]; M_near [H, I, J], bool.

FLOPs per head: 2*d*e*n_k + 2*d*e*n_q + 2*d*n_k*n_q*ν + 3*d*n_k + 3*d*n_q + 2*e*n_k*n_q*ν + e*n_k + 5*e*n_q +
5*n_k*n_q*ν + 2*n_q + 4*d*n_k*n_q/T_q + 2*e*n_k*n_q/T_q + 3*n_k*n_q/T_q + 2*n_q/T_q + 2*d*n_k*n_q/T_k +
2*e*n_k*n_q/T_k + 7*n_k*n_q/T_k + 2*d*e*n_k*n_q/(T_k*T_q) + 6*d*n_k*n_q/(T_k*T_q) + 9*n_k*n_q/(T_k*T_q)
"""

import torch

PAIR_ELEMENTS = 524288
LOG2E = 1.4426950408889634


def side_by_side(shape, *parts):
    """Columns of several values, each broadcast to the shape; a value without columns is one."""
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


@torch.no_grad()
def run(inputs, scalars, block, choose):
    """Outputs by name, [H, tiles, ...]."""
    s = scalars["s"]
    Q, K = inputs["Q"], inputs["K"]
    H, A, T_q, d = Q.shape
    _, B, T_k, e = inputs["V"].shape
    one, all_tiles = Q.new_ones(1), A
    step = max(1, PAIR_ELEMENTS // (T_q * T_k))
    outputs = {}
    outputs["O"] = Q.new_empty(H, all_tiles, T_q, e)
    outputs["D"] = Q.new_empty(H, all_tiles, T_q)
    for h in range(H):
        W_K = inputs["W_K"][h]
        K = inputs["K"][h]
        KBAR = torch.einsum("uv, uvw -> uw", W_K, K)
        KAPPA = K - KBAR[:, None, :]
        V = inputs["V"][h]
        operand = side_by_side((B, T_k,), one, KAPPA, V)
        operand_3 = side_by_side((B, T_k,), K, one)
        operand_4 = side_by_side((B, T_k,), one, V)
        t_71 = W_K.permute(1, 0)[:, :, None] * V.permute(1, 0, 2)
        t_72 = torch.einsum("uvw, vux -> vxw", t_71, KAPPA).permute(0, 2, 1)
        MB = t_72.permute(0, 2, 1)
        for at in range(0, all_tiles, block):
            tiles = slice(at, min(at + block, all_tiles))
            A = tiles.stop - tiles.start
            W_Q = inputs["W_Q"][h, tiles]
            Q = inputs["Q"][h, tiles]
            MU = torch.einsum("uv, uvw -> uw", W_Q, Q)
            t_35 = torch.einsum("uv, wxv -> uwx", s * LOG2E * MU, KAPPA).permute(2, 0, 1)
            Y = t_35.permute(1, 2, 0)
            OMEGA = Y.exp2_()
            together = torch.einsum("uvw, vwK -> uvK", OMEGA, operand)
            DP = together[..., 0]
            KP = together[..., 0 + 1 : 0 + 1 + d]
            NP = together[..., 0 + 1 + d : 0 + 1 + d + e]
            t_44 = DP.reciprocal()
            CK = KP.mul_(t_44[:, :, None])
            chosen = choose(h, tiles, {"MU": MU, "KBAR": KBAR, "DP": DP, "CK": CK, "NP": NP})
            near, hidden = chosen["M_near"], ~chosen["M_far"]
            off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)
            SHIFT = chosen["SHIFT"] if "SHIFT" in chosen else inputs["SHIFT"][h, tiles]
            operand_2 = side_by_side((A, T_q,), s * LOG2E * Q, -1 * LOG2E * SHIFT[:, :, None])
            C = KBAR[None, :, :] + CK
            t_56 = torch.einsum("uvw, uw -> uv", CK, -s * MU)
            operand_5 = side_by_side((A, T_q,), s * LOG2E * Q, one, -1 * LOG2E * SHIFT[:, :, None], one)
            operand_6 = side_by_side((A, B,), C, LOG2E * t_56[:, :, None], one, off[:, :, None])
            X = torch.einsum("uvK, uwK -> uvw", operand_5, operand_6)
            t_60 = X.exp2_()
            t_61 = t_60.permute(1, 0, 2)
            E = t_61.permute(1, 0, 2)
            operand_7 = side_by_side((A, B,), DP[:, :, None], NP)
            together_2 = torch.einsum("uvw, uwK -> uvK", E, operand_7)
            t_65 = together_2[..., 0].permute(1, 0)
            t_66 = together_2[..., 0 + 1 : 0 + 1 + e].permute(1, 0, 2)
            DFAR = t_65.permute(1, 0)
            NFAR = t_66.permute(1, 0, 2)
            t_74 = torch.einsum("uv, wv -> uw", MU, KBAR)
            TOP = chosen["TOP"] if "TOP" in chosen else inputs["TOP"][h, tiles]
            Z = s * t_74 - TOP[:, None]
            t_77 = Z.exp_()
            t_78 = t_77.masked_fill_(hidden, 0)
            WP = t_78.mul_(DP)
            t_80 = WP.sum(1)
            FLOOR = inputs["FLOOR"][h, tiles]
            WFAR = t_80 + FLOOR
            t_83 = WFAR.reciprocal_()
            LAMBDA = t_83[:, None] * WP
            t_85 = torch.einsum("uvw, xu -> xvw", MB, LAMBDA).permute(1, 2, 0)
            MA = t_85.permute(2, 0, 1)
            DELTA = Q - MU[:, None, :]
            t_88 = torch.einsum("uvw, uxv -> uxw", MA, DELTA).permute(1, 0, 2)
            t_89 = t_88.mul_(DFAR.permute(1, 0)[:, :, None])
            rows, columns = near.nonzero(as_tuple=True)
            sums = Q.new_zeros(A, T_q, 1 + e)
            for p in range(0, len(rows), step):
                a, b = rows[p : p + step], columns[p : p + step]
                SN = torch.einsum("PvK, PxK -> Pvx", operand_2.index_select(0, a), operand_3.index_select(0, b))
                t_50 = SN.exp2_()
                sums.index_add_(0, a, torch.einsum("Pij, PjK -> PiK", t_50, operand_4.index_select(0, b)))
            t_53 = sums[..., 0]
            t_54 = sums[..., 0 + 1 : 0 + 1 + e].permute(1, 0, 2)
            D = t_53 + DFAR
            t_69 = D.reciprocal()
            N = t_54.permute(1, 0, 2) + NFAR + s * t_89.permute(1, 0, 2)
            t_91 = N.permute(1, 0, 2).mul_(t_69.permute(1, 0)[:, :, None])
            OUT = t_91.permute(1, 0, 2)
            outputs["O"][h, tiles] = OUT
            outputs["D"][h, tiles] = D
    return outputs
