"""backward of attention, clustered, order 1, with exact pairs of tiles: dQ, dK, dV.

Tokens are in tiles: queries [H, A, T_q, ·], keys and values [H, B, T_k, ·]; inputs are D, FLOOR, G, K, O, Q, V, W_K, W_Q.
choose(head, tiles, values) says which pairs of tiles are near, and yields SHIFT, TOP where they are no inputs.
SHIFT and W_Q [H, I, T_q], TOP and FLOOR [H, I], W_K and LOG_B [H, J, T_k]; M_near [H, I, J], bool.

FLOPs per head: 6*d*e*n_k + 4*d*e*n_q + 6*d*n_k*n_q*ν + 12*d*n_k + 14*d*n_q + 4*e*n_k*n_q*ν + 4*e*n_k + 4*e*n_q +
6*n_k*n_q*ν + 4*n_q + d*e*n_q/T_q + 12*d*n_k*n_q/T_q + 6*d*n_q/T_q + 6*e*n_k*n_q/T_q + 6*n_k*n_q/T_q + 3*n_q/T_q +
6*d*n_k*n_q/T_k + 3*d*n_k/T_k + 4*e*n_k*n_q/T_k + 13*n_k*n_q/T_k + 6*d*e*n_k*n_q/(T_k*T_q) + 20*d*n_k*n_q/(T_k*T_q) +
19*n_k*n_q/(T_k*T_q)
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
    outputs["dQ"] = Q.new_empty(H, all_tiles, T_q, d)
    outputs["dK"] = Q.new_empty(H, B, T_k, d)
    outputs["dV"] = Q.new_empty(H, B, T_k, e)
    for h in range(H):
        W_K = inputs["W_K"][h]
        K = inputs["K"][h]
        KBAR = torch.einsum("uv, uvw -> uw", W_K, K)
        KAPPA = K - KBAR[:, None, :]
        V = inputs["V"][h]
        operand = side_by_side((B, T_k,), one, KAPPA, V)
        t_57 = W_K.permute(1, 0)[:, :, None] * V.permute(1, 0, 2)
        t_58 = torch.einsum("uvw, vux -> vxw", t_57, KAPPA).permute(0, 2, 1)
        MB = t_58.permute(0, 2, 1)
        operand_8 = side_by_side((B, T_k,), V, KAPPA, one)
        operand_10 = side_by_side((B, T_k,), K, one)
        operand_12 = side_by_side((B, T_k,), V, one)
        dMB = 0
        t_149 = 0
        t_150 = 0
        t_151 = 0
        t_153 = 0
        t_154 = 0
        sums_2 = Q.new_zeros(B, T_k, d)
        sums_3 = Q.new_zeros(B, T_k, e)
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
            C = KBAR[None, :, :] + CK
            t_47 = torch.einsum("uvw, uw -> uv", CK, -s * MU)
            SHIFT = chosen["SHIFT"] if "SHIFT" in chosen else inputs["SHIFT"][h, tiles]
            operand_2 = side_by_side((A, T_q,), s * LOG2E * Q, one, -1 * LOG2E * SHIFT[:, :, None], one)
            operand_3 = side_by_side((A, B,), C, LOG2E * t_47[:, :, None], one, off[:, :, None])
            X = torch.einsum("uvK, uwK -> uvw", operand_2, operand_3)
            t_52 = X.exp2_()
            t_53 = t_52.permute(1, 0, 2)
            E = t_53.permute(1, 0, 2)
            t_55 = torch.einsum("uv, uwv -> uw", DP, E).permute(1, 0)
            DFAR = t_55.permute(1, 0)
            t_60 = torch.einsum("uv, wv -> uw", MU, KBAR)
            TOP = chosen["TOP"] if "TOP" in chosen else inputs["TOP"][h, tiles]
            Z = s * t_60 - TOP[:, None]
            t_63 = Z.exp_()
            t_64 = t_63.masked_fill(hidden, 0)
            WP = t_64.mul_(DP)
            t_66 = WP.sum(1)
            FLOOR = inputs["FLOOR"][h, tiles]
            WFAR = t_66 + FLOOR
            t_69 = WFAR.reciprocal_()
            LAMBDA = t_69[:, None] * WP
            t_71 = torch.einsum("uvw, xu -> xvw", MB, LAMBDA).permute(1, 2, 0)
            MA = t_71.permute(2, 0, 1)
            D = inputs["D"][h, tiles]
            t_74 = D.reciprocal()
            G = inputs["G"][h, tiles]
            t_76 = t_74.permute(1, 0)[:, :, None] * G.permute(1, 0, 2)
            dN = t_76.permute(1, 0, 2)
            t_78 = torch.einsum("uvw, uxw -> uxv", MA, dN).permute(1, 0, 2)
            t_79 = DFAR.permute(1, 0)[:, :, None] * t_78
            dDELTA = s * t_79.permute(1, 0, 2)
            DELTA = Q - MU[:, None, :]
            t_82 = torch.einsum("uvw, vuw -> uv", DELTA, t_78).permute(1, 0)
            OUT = inputs["O"][h, tiles]
            t_84 = torch.einsum("uvw, uvw -> uv", OUT, G).permute(1, 0)
            t_85 = t_84.mul_(t_74.permute(1, 0))
            dD = -t_85.permute(1, 0)
            dDFAR = s * t_82.permute(1, 0) + dD
            operand_4 = side_by_side((A, T_q,), dN, dDFAR[:, :, None])
            operand_5 = side_by_side((A, B,), NP, DP[:, :, None])
            dE = torch.einsum("uvK, uwK -> uvw", operand_4, operand_5)
            t_91 = dE.permute(1, 0, 2).mul_(E.permute(1, 0, 2))
            dX = t_91.permute(1, 0, 2)
            t_93 = torch.einsum("uvw, uwx -> uvx", dX, C).permute(1, 0, 2)
            t_94 = dN.permute(1, 0, 2) * DFAR.permute(1, 0)[:, :, None]
            t_95 = torch.einsum("uvw, vux -> vxw", s * t_94, DELTA).permute(0, 2, 1)
            dMA = t_95.permute(0, 2, 1)
            t_97 = torch.einsum("uvw, xvw -> xu", MB, dMA).permute(1, 0)
            dLAMBDA = t_97.permute(1, 0)
            t_99 = t_69[:, None] * dLAMBDA
            t_100 = torch.einsum("uv, uv -> u", LAMBDA, dLAMBDA)
            t_101 = t_100.mul_(t_69)
            dWFAR = -t_101
            dWP = t_99 + dWFAR[:, None]
            dZ = dWP * WP
            t_105 = torch.einsum("uv, vw -> uw", dZ, KBAR)
            t_106 = dDELTA.sum(1)
            operand_6 = side_by_side((A, T_q,), one, Q)
            together_2 = torch.einsum("uvw, uvK -> uwK", dX, operand_6)
            dXI = together_2[..., 0]
            t_110 = together_2[..., 0 + 1 : 0 + 1 + d]
            t_111 = torch.einsum("uv, uvw -> uw", dXI, CK)
            together_3 = torch.einsum("uvw, uvK -> uwK", E, operand_4)
            t_113 = together_3[..., 0 : 0 + e].permute(0, 2, 1)
            t_114 = together_3[..., 0 + e]
            dNP = t_113.permute(0, 2, 1)
            t_116 = dXI[:, :, None] * MU[:, None, :]
            dC = s * t_110
            dCK = -s * t_116 + dC
            dKP = dCK * t_44[:, :, None]
            t_120 = t_63 * dWP
            t_121 = t_120.masked_fill_(hidden, 0)
            t_122 = torch.einsum("uvw, uvw -> uv", dCK, CK)
            t_123 = t_122.mul_(t_44)
            dDP = t_121 + t_114 - t_123
            operand_7 = side_by_side((B, A,), dNP.permute(1, 0, 2), dKP.permute(1, 0, 2), dDP.permute(1, 0)[:, :, None])
            dOMEGA = torch.einsum("vuK, vwK -> uvw", operand_7, operand_8)
            t_128 = dOMEGA.permute(2, 0, 1).mul_(OMEGA.permute(2, 0, 1))
            dY = t_128.permute(1, 2, 0)
            t_130 = torch.einsum("uvw, vwx -> ux", dY, KAPPA)
            dMU = s * t_105 - t_106 - s * t_111 + s * t_130
            t_132 = dMU[None, :, :] * W_Q.permute(1, 0)[:, :, None]
            operand_9 = side_by_side((A, T_q,), s * LOG2E * Q, -1 * LOG2E * SHIFT[:, :, None])
            operand_11 = side_by_side((A, T_q,), dN, dD[:, :, None])
            dMB = dMB + torch.einsum("uv, uwx -> vwx", LAMBDA, dMA)
            operand_13 = side_by_side((B, A,), dKP.permute(1, 0, 2), dNP.permute(1, 0, 2))
            together_4 = torch.einsum("uvw, vuK -> vwK", OMEGA, operand_13)
            t_149 = t_149 + together_4[..., 0 : 0 + d].permute(1, 0, 2)
            t_150 = t_150 + together_4[..., 0 + d : 0 + d + e].permute(1, 0, 2)
            t_151 = t_151 + torch.einsum("uvw, ux -> vwx", dY, MU).permute(1, 0, 2)
            t_153 = t_153 + torch.einsum("uv, uw -> vw", dZ, MU)
            t_154 = t_154 + dC.sum(0)
            rows, columns = near.nonzero(as_tuple=True)
            sums = Q.new_zeros(A, T_q, d)
            for p in range(0, len(rows), step):
                a, b = rows[p : p + step], columns[p : p + step]
                SN = torch.einsum("PvK, PxK -> Pvx", operand_9.index_select(0, a), operand_10.index_select(0, b))
                t_136 = SN.exp2_()
                dPN = torch.einsum("PvK, PxK -> Pvx", operand_11.index_select(0, a), operand_12.index_select(0, b))
                t_140 = dPN.mul_(t_136)
                sums.index_add_(0, a, torch.einsum("Pij, PjK -> PiK", t_140, K.index_select(0, b)))
                sums_2.index_add_(0, b, torch.einsum("Pij, PiK -> PjK", t_140, Q.index_select(0, a)))
                sums_3.index_add_(0, b, torch.einsum("Pij, PiK -> PjK", t_136, dN.index_select(0, a)))
            t_142 = sums[..., 0 : 0 + d].permute(1, 2, 0)
            t_143 = dDELTA + s * t_93.permute(1, 0, 2) + t_132.permute(1, 0, 2) + s * t_142.permute(2, 0, 1)
            outputs["dQ"][h, tiles] = t_143
        t_145 = torch.einsum("uvw, uxw -> uxv", dMB, V).permute(1, 0, 2)
        t_146 = t_145.mul_(W_K.permute(1, 0)[:, :, None])
        dKAPPA = t_146.permute(1, 0, 2) + t_149.permute(1, 0, 2) + s * t_151.permute(1, 0, 2)
        t_155 = dKAPPA.sum(1)
        dKBAR = s * t_153 + t_154 - t_155
        t_157 = W_K.permute(1, 0)[:, :, None] * dKBAR[None, :, :]
        t_159 = sums_2[..., 0 : 0 + d].permute(1, 0, 2)
        t_160 = dKAPPA + t_157.permute(1, 0, 2) + s * t_159.permute(1, 0, 2)
        t_162 = sums_3[..., 0 : 0 + e].permute(1, 0, 2)
        t_163 = torch.einsum("uvw, uxv -> uxw", dMB, KAPPA).permute(1, 0, 2)
        t_164 = t_163.mul_(W_K.permute(1, 0)[:, :, None])
        t_165 = t_162.permute(1, 0, 2) + t_164.permute(1, 0, 2) + t_150.permute(1, 0, 2)
        outputs["dK"][h] = t_160
        outputs["dV"][h] = t_165
    return outputs
