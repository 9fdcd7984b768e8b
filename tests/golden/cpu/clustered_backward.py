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

LOG2E = 1.4426950408889634

SOURCE = r"""
#include "polyattn_tiles.h"

// tiles of keys: t_92, OMEGA
extern "C" void key_tiles_1(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size operand_whole_columns = size[5];
  const Size KAPPA_packed_columns = size[6];
  const Size KAPPA_wide_columns = size[7];
  const Size KP_sums_columns = size[8];
  const Size V_wide_columns = size[9];
  const Size NP_sums_columns = size[10];
  const Size lanes = padded(T_k);
  float* const operand_whole = static_cast<float*>(tensor[0]);  // [A, columns]
  float* const KAPPA_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const DP_sums = static_cast<float*>(tensor[2]);  // [A, B]
  float* const KAPPA_wide = static_cast<float*>(tensor[3]);  // [B, T_k, columns]
  float* const KP_sums = static_cast<float*>(tensor[4]);  // [A, B, columns]
  float* const V_wide = static_cast<float*>(tensor[5]);  // [B, T_k, columns]
  float* const NP_sums = static_cast<float*>(tensor[6]);  // [A, B, columns]
  float* const OMEGA = static_cast<float*>(tensor[7]);  // [B, A, lanes]
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (Size b = 0; b < B; ++b) {
      for (Size row = 0; row < A; row += CHUNK) {
        const Size rows = std::min(CHUNK, A - row);
        float* const OMEGA_tile = OMEGA + (b * A + row) * lanes;
        product(rows, lanes, operand_whole_columns, operand_whole + row * operand_whole_columns, operand_whole_columns,
            KAPPA_packed + b * KAPPA_packed_columns * lanes, lanes, [&](Vec t_92, Size at) {
          const Vec OMEGA = exp2(t_92);
          store(OMEGA_tile + at, OMEGA);
        });
        sum_lanes(rows, T_k, OMEGA_tile, nullptr, DP_sums + row * B + b, B);
        sum_lanes(rows, T_k, OMEGA_tile, KAPPA_wide_columns, KAPPA_wide + b * T_k * KAPPA_wide_columns,
            KAPPA_wide_columns, KP_sums + (row * B + b) * KP_sums_columns, B * KP_sums_columns);
        sum_lanes(rows, T_k, OMEGA_tile, V_wide_columns, V_wide + b * T_k * V_wide_columns, V_wide_columns, NP_sums +
            (row * B + b) * NP_sums_columns, B * NP_sums_columns);
      }
    }
  }
}

// tiles of queries: X, dE, E, dX
extern "C" void query_tiles_2(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size operand_2_packed_columns = size[5];
  const Size operand_3_columns = size[6];
  const Size operand_4_packed_columns = size[7];
  const Size operand_5_columns = size[8];
  const Size C_wide_columns = size[9];
  const Size t_135_sums_columns = size[10];
  const Size Q_wide_columns = size[11];
  const Size t_140_sums_columns = size[12];
  const Size dN_wide_columns = size[13];
  const Size t_143_sums_columns = size[14];
  const Size lanes = padded(T_q);
  float* const operand_2_packed = static_cast<float*>(tensor[0]);  // [A, columns, lanes]
  float* const operand_3 = static_cast<float*>(tensor[1]);  // [A, B, columns]
  float* const operand_4_packed = static_cast<float*>(tensor[2]);  // [A, columns, lanes]
  float* const operand_5 = static_cast<float*>(tensor[3]);  // [A, B, columns]
  float* const DP_whole = static_cast<float*>(tensor[4]);  // [A, B]
  float* const t_132_sums = static_cast<float*>(tensor[5]);  // [A, T_q]
  float* const C_wide = static_cast<float*>(tensor[6]);  // [A, B, columns]
  float* const t_135_sums = static_cast<float*>(tensor[7]);  // [A, T_q, columns]
  float* const dXI_sums = static_cast<float*>(tensor[8]);  // [A, B]
  float* const Q_wide = static_cast<float*>(tensor[9]);  // [A, T_q, columns]
  float* const t_140_sums = static_cast<float*>(tensor[10]);  // [A, B, columns]
  float* const dN_wide = static_cast<float*>(tensor[11]);  // [A, T_q, columns]
  float* const t_143_sums = static_cast<float*>(tensor[12]);  // [A, B, columns]
  float* const dDFAR_whole = static_cast<float*>(tensor[13]);  // [A, T_q]
  float* const t_146_sums = static_cast<float*>(tensor[14]);  // [A, B]
#pragma omp parallel num_threads(threads)
  {
    Tile E_tile(T_q);
    Tile dX_tile(T_q);
#pragma omp for schedule(dynamic)
    for (Size a = 0; a < A; ++a) {
      for (Size row = 0; row < B; row += CHUNK) {
        const Size rows = std::min(CHUNK, B - row);
        product(rows, lanes, operand_3_columns, operand_3 + (a * B + row) * operand_3_columns, operand_3_columns,
            operand_2_packed + a * operand_2_packed_columns * lanes, lanes, [&](Vec X, Size at) {
          const Vec E = exp2(X);
          store(E_tile + at, E);
        });
        product(rows, lanes, operand_5_columns, operand_5 + (a * B + row) * operand_5_columns, operand_5_columns,
            operand_4_packed + a * operand_4_packed_columns * lanes, lanes, [&](Vec dE, Size at) {
          const Vec dX = dE * load(E_tile + at);
          store(dX_tile + at, dX);
        });
        sum_rows(rows, T_q, E_tile, DP_whole + a * B + row, 1, t_132_sums + a * T_q);
        sum_rows(rows, T_q, dX_tile, C_wide_columns, C_wide + (a * B + row) * C_wide_columns, C_wide_columns, t_135_sums
            + a * T_q * t_135_sums_columns, t_135_sums_columns);
        sum_lanes(rows, T_q, dX_tile, nullptr, dXI_sums + a * B + row, 1);
        sum_lanes(rows, T_q, dX_tile, Q_wide_columns, Q_wide + a * T_q * Q_wide_columns, Q_wide_columns, t_140_sums + (a
            * B + row) * t_140_sums_columns, t_140_sums_columns);
        sum_lanes(rows, T_q, E_tile, dN_wide_columns, dN_wide + a * T_q * dN_wide_columns, dN_wide_columns, t_143_sums +
            (a * B + row) * t_143_sums_columns, t_143_sums_columns);
        sum_lanes(rows, T_q, E_tile, dDFAR_whole + a * T_q, t_146_sums + a * B + row, 1);
      }
    }
  }
}

// tiles of keys: dOMEGA, dY
extern "C" void key_tiles_3(void* const* tensor, const Size* size, const double* number) {
  const Size slots = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size operand_6_columns = size[5];
  const Size operand_7_packed_columns = size[6];
  const Size KAPPA_wide_columns = size[7];
  const Size t_187_sums_columns = size[8];
  const Size dKP_wide_columns = size[9];
  const Size t_190_sums_columns = size[10];
  const Size dNP_wide_columns = size[11];
  const Size t_193_sums_columns = size[12];
  const Size MU_wide_columns = size[13];
  const Size t_196_sums_columns = size[14];
  const Size lanes = padded(T_k);
  float* const operand_6 = static_cast<float*>(tensor[0]);  // [B, A, columns]
  float* const operand_7_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const OMEGA = static_cast<float*>(tensor[2]);  // [B, A, lanes]
  float* const KAPPA_wide = static_cast<float*>(tensor[3]);  // [B, T_k, columns]
  float* const t_187_sums = static_cast<float*>(tensor[4]);  // [slots, A, columns]
  float* const dKP_wide = static_cast<float*>(tensor[5]);  // [A, B, columns]
  float* const t_190_sums = static_cast<float*>(tensor[6]);  // [B, T_k, columns]
  float* const dNP_wide = static_cast<float*>(tensor[7]);  // [A, B, columns]
  float* const t_193_sums = static_cast<float*>(tensor[8]);  // [B, T_k, columns]
  float* const MU_wide = static_cast<float*>(tensor[9]);  // [A, columns]
  float* const t_196_sums = static_cast<float*>(tensor[10]);  // [B, T_k, columns]
#pragma omp parallel num_threads(slots)
  {
    Tile dY_tile(T_k);
#pragma omp for schedule(static, 1)
    for (Size slot = 0; slot < slots; ++slot)
      for (Size b = slot * B / slots, end = (slot + 1) * B / slots; b < end; ++b) {
        for (Size row = 0; row < A; row += CHUNK) {
          const Size rows = std::min(CHUNK, A - row);
          float* const OMEGA_tile = OMEGA + (b * A + row) * lanes;
          product(rows, lanes, operand_6_columns, operand_6 + (b * A + row) * operand_6_columns, operand_6_columns,
              operand_7_packed + b * operand_7_packed_columns * lanes, lanes, [&](Vec dOMEGA, Size at) {
            const Vec dY = load(OMEGA_tile + at) * dOMEGA;
            store(dY_tile + at, dY);
          });
          sum_lanes(rows, T_k, dY_tile, KAPPA_wide_columns, KAPPA_wide + b * T_k * KAPPA_wide_columns,
              KAPPA_wide_columns, t_187_sums + (slot * A + row) * t_187_sums_columns, t_187_sums_columns);
          sum_rows(rows, T_k, OMEGA_tile, dKP_wide_columns, dKP_wide + (row * B + b) * dKP_wide_columns, B *
              dKP_wide_columns, t_190_sums + b * T_k * t_190_sums_columns, t_190_sums_columns);
          sum_rows(rows, T_k, OMEGA_tile, dNP_wide_columns, dNP_wide + (row * B + b) * dNP_wide_columns, B *
              dNP_wide_columns, t_193_sums + b * T_k * t_193_sums_columns, t_193_sums_columns);
          sum_rows(rows, T_k, dY_tile, MU_wide_columns, MU_wide + row * MU_wide_columns, MU_wide_columns, t_196_sums + b
              * T_k * t_196_sums_columns, t_196_sums_columns);
        }
      }
  }
}

// near pairs of tiles: SN, dPN, PN, dSN
extern "C" void near_pairs_4(void* const* tensor, const Size* size, const double* number) {
  const Size slots = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size operand_8_columns = size[5];
  const Size operand_9_packed_columns = size[6];
  const Size operand_10_columns = size[7];
  const Size operand_11_packed_columns = size[8];
  const Size K_wide_columns = size[9];
  const Size t_215_sums_columns = size[10];
  const Size Q_wide_columns = size[11];
  const Size t_217_sums_columns = size[12];
  const Size dN_wide_columns = size[13];
  const Size t_219_sums_columns = size[14];
  const Size lanes = padded(T_k);
  float* const operand_8 = static_cast<float*>(tensor[0]);  // [A, T_q, columns]
  float* const operand_9_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const operand_10 = static_cast<float*>(tensor[2]);  // [A, T_q, columns]
  float* const operand_11_packed = static_cast<float*>(tensor[3]);  // [B, columns, lanes]
  float* const K_wide = static_cast<float*>(tensor[4]);  // [B, T_k, columns]
  float* const t_215_sums = static_cast<float*>(tensor[5]);  // [A, T_q, columns]
  float* const Q_wide = static_cast<float*>(tensor[6]);  // [A, T_q, columns]
  float* const t_217_sums = static_cast<float*>(tensor[7]);  // [slots, B, T_k, columns]
  float* const dN_wide = static_cast<float*>(tensor[8]);  // [A, T_q, columns]
  float* const t_219_sums = static_cast<float*>(tensor[9]);  // [slots, B, T_k, columns]
  const Size* const first = static_cast<Size*>(tensor[10]);
  const Size* const column = static_cast<Size*>(tensor[11]);
#pragma omp parallel num_threads(slots)
  {
    Tile PN_tile(T_k);
    Tile dSN_tile(T_k);
#pragma omp for schedule(static, 1)
    for (Size slot = 0; slot < slots; ++slot)
      for (Size a = share(slot, slots, A, first), end = share(slot + 1, slots, A, first); a < end; ++a) {
        for (Size pair = first[a]; pair < first[a + 1]; ++pair) {
          const Size b = column[pair];
          for (Size row = 0; row < T_q; row += CHUNK) {
            const Size rows = std::min(CHUNK, T_q - row);
            product(rows, lanes, operand_8_columns, operand_8 + (a * T_q + row) * operand_8_columns, operand_8_columns,
                operand_9_packed + b * operand_9_packed_columns * lanes, lanes, [&](Vec SN, Size at) {
              const Vec PN = exp2(SN);
              store(PN_tile + at, PN);
            });
            product(rows, lanes, operand_10_columns, operand_10 + (a * T_q + row) * operand_10_columns,
                operand_10_columns, operand_11_packed + b * operand_11_packed_columns * lanes, lanes, [&](Vec dPN, Size
                at) {
              const Vec dSN = load(PN_tile + at) * dPN;
              store(dSN_tile + at, dSN);
            });
            sum_lanes(rows, T_k, dSN_tile, K_wide_columns, K_wide + b * T_k * K_wide_columns, K_wide_columns, t_215_sums
                + (a * T_q + row) * t_215_sums_columns, t_215_sums_columns);
            sum_rows(rows, T_k, dSN_tile, Q_wide_columns, Q_wide + (a * T_q + row) * Q_wide_columns, Q_wide_columns,
                t_217_sums + (slot * B + b) * T_k * t_217_sums_columns, t_217_sums_columns);
            sum_rows(rows, T_k, PN_tile, dN_wide_columns, dN_wide + (a * T_q + row) * dN_wide_columns, dN_wide_columns,
                t_219_sums + (slot * B + b) * T_k * t_219_sums_columns, t_219_sums_columns);
          }
        }
      }
  }
}
"""


def side_by_side(shape, *parts):
    """Columns of several values, each broadcast to the shape; a value without columns is one."""
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def padded(size):
    """The length of an axis that vectors run along, in memory."""
    return size + -size % 16


def packed(x):
    """The last two axes exchanged; the last one, along which vectors run, is padded."""
    return torch.nn.functional.pad(x.mT, (0, -x.shape[-2] % 16)).contiguous()


def wide(x):
    """A value in one piece whose columns are padded."""
    missing = -x.shape[-1] % 16
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


@torch.no_grad()
def run(inputs, scalars, block, choose, call):
    """Outputs by name, [H, tiles, ...]."""
    s = scalars["s"]
    Q, K = inputs["Q"], inputs["K"]
    H, A, T_q, d = Q.shape
    _, B, T_k, e = inputs["V"].shape
    one, all_tiles = Q.new_ones(1), A
    threads = torch.get_num_threads()
    slots = min(threads, 16)
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
        t_74 = W_K.permute(1, 0)[:, :, None] * V.permute(1, 0, 2)
        t_75 = torch.einsum("uvw, vux -> vxw", t_74, KAPPA).permute(0, 2, 1)
        MB = t_75.permute(0, 2, 1)
        KAPPA_packed = packed(KAPPA)
        KAPPA_wide = wide(KAPPA)
        V_wide = wide(V)
        operand_7 = side_by_side((B, T_k,), V, KAPPA, one)
        operand_7_packed = packed(operand_7)
        operand_9 = side_by_side((B, T_k,), K, one)
        operand_9_packed = packed(operand_9)
        operand_11 = side_by_side((B, T_k,), V, one)
        operand_11_packed = packed(operand_11)
        K_wide = wide(K)
        dMB = 0
        t_178 = 0
        t_179 = 0
        t_190_sums = Q.new_zeros(B, T_k, padded(d))
        t_193_sums = Q.new_zeros(B, T_k, padded(e))
        t_196_sums = Q.new_zeros(B, T_k, padded(d))
        t_217_sums = Q.new_zeros(slots, B, T_k, padded(d))
        t_219_sums = Q.new_zeros(slots, B, T_k, padded(e))
        for at in range(0, all_tiles, block):
            tiles = slice(at, min(at + block, all_tiles))
            A = tiles.stop - tiles.start
            W_Q = inputs["W_Q"][h, tiles]
            Q = inputs["Q"][h, tiles]
            MU = torch.einsum("uv, uvw -> uw", W_Q, Q)
            t_77 = torch.einsum("uv, wv -> uw", MU, KBAR)
            FLOOR = inputs["FLOOR"][h, tiles]
            D = inputs["D"][h, tiles]
            t_80 = D.reciprocal()
            G = inputs["G"][h, tiles]
            t_82 = t_80.permute(1, 0)[:, :, None] * G.permute(1, 0, 2)
            dN = t_82.permute(1, 0, 2)
            DELTA = Q - MU[:, None, :]
            OUT = inputs["O"][h, tiles]
            t_86 = torch.einsum("uvw, uvw -> uv", OUT, G).permute(1, 0)
            t_87 = t_86.mul_(t_80.permute(1, 0))
            dD = -t_87.permute(1, 0)
            operand = s * LOG2E * MU
            operand_whole = operand.contiguous()
            DP_sums = Q.new_zeros(A, B)
            KP_sums = Q.new_zeros(A, B, padded(d))
            NP_sums = Q.new_zeros(A, B, padded(e))
            OMEGA = Q.new_empty(B, A, padded(T_k))
            call("key_tiles_1", (operand_whole, KAPPA_packed, DP_sums, KAPPA_wide, KP_sums, V_wide, NP_sums, OMEGA,),
                (threads, A, B, T_q, T_k, operand_whole.shape[-1], KAPPA_packed.shape[-2], KAPPA_wide.shape[-1],
                KP_sums.shape[-1], V_wide.shape[-1], NP_sums.shape[-1],))
            DP = DP_sums
            KP = KP_sums[..., :d]
            NP = NP_sums[..., :e]
            t_102 = DP.reciprocal()
            CK = KP.mul_(t_102[:, :, None])
            chosen = choose(h, tiles, {"MU": MU, "KBAR": KBAR, "DP": DP, "CK": CK, "NP": NP})
            near, hidden = chosen["M_near"], ~chosen["M_far"]
            off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)
            first = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
            column = near.nonzero()[:, 1].contiguous()
            C = KBAR[None, :, :] + CK
            t_105 = torch.einsum("uvw, uw -> uv", CK, -s * MU)
            SHIFT = chosen["SHIFT"] if "SHIFT" in chosen else inputs["SHIFT"][h, tiles]
            TOP = chosen["TOP"] if "TOP" in chosen else inputs["TOP"][h, tiles]
            Z = s * t_77 - TOP[:, None]
            t_109 = Z.exp_()
            t_110 = t_109.masked_fill(hidden, 0)
            WP = t_110.mul_(DP)
            t_112 = WP.sum(1)
            WFAR = t_112 + FLOOR
            t_114 = WFAR.reciprocal_()
            LAMBDA = t_114[:, None] * WP
            t_116 = torch.einsum("uvw, xu -> xvw", MB, LAMBDA).permute(1, 2, 0)
            MA = t_116.permute(2, 0, 1)
            t_118 = torch.einsum("uvw, uxw -> uxv", MA, dN).permute(1, 0, 2)
            t_119 = torch.einsum("uvw, vuw -> uv", DELTA, t_118).permute(1, 0)
            dDFAR = s * t_119.permute(1, 0) + dD
            operand_2 = side_by_side((A, T_q,), s * LOG2E * Q, one, -1 * LOG2E * SHIFT[:, :, None], one)
            operand_2_packed = packed(operand_2)
            operand_3 = side_by_side((A, B,), C, LOG2E * t_105[:, :, None], one, off[:, :, None])
            operand_4 = side_by_side((A, T_q,), dN, dDFAR[:, :, None])
            operand_4_packed = packed(operand_4)
            operand_5 = side_by_side((A, B,), NP, DP[:, :, None])
            DP_whole = DP.contiguous()
            t_132_sums = Q.new_zeros(A, T_q)
            C_wide = wide(C)
            t_135_sums = Q.new_zeros(A, T_q, padded(d))
            dXI_sums = Q.new_zeros(A, B)
            Q_wide = wide(Q)
            t_140_sums = Q.new_zeros(A, B, padded(d))
            dN_wide = wide(dN)
            t_143_sums = Q.new_zeros(A, B, padded(e))
            dDFAR_whole = dDFAR.contiguous()
            t_146_sums = Q.new_zeros(A, B)
            call("query_tiles_2", (operand_2_packed, operand_3, operand_4_packed, operand_5, DP_whole, t_132_sums, C_wide,
                t_135_sums, dXI_sums, Q_wide, t_140_sums, dN_wide, t_143_sums, dDFAR_whole, t_146_sums,), (threads, A, B,
                T_q, T_k, operand_2_packed.shape[-2], operand_3.shape[-1], operand_4_packed.shape[-2], operand_5.shape[-1],
                C_wide.shape[-1], t_135_sums.shape[-1], Q_wide.shape[-1], t_140_sums.shape[-1], dN_wide.shape[-1],
                t_143_sums.shape[-1],))
            t_132 = t_132_sums.permute(1, 0)
            t_135 = t_135_sums[..., :d].permute(1, 0, 2)
            dXI = dXI_sums
            t_140 = t_140_sums[..., :d]
            t_143 = t_143_sums[..., :e].permute(0, 2, 1)
            t_146 = t_146_sums
            DFAR = t_132.permute(1, 0)
            t_149 = DFAR.permute(1, 0)[:, :, None] * t_118
            dDELTA = s * t_149.permute(1, 0, 2)
            t_151 = dN.permute(1, 0, 2) * DFAR.permute(1, 0)[:, :, None]
            t_152 = torch.einsum("uvw, vux -> vxw", s * t_151, DELTA).permute(0, 2, 1)
            dMA = t_152.permute(0, 2, 1)
            t_154 = torch.einsum("uvw, xvw -> xu", MB, dMA).permute(1, 0)
            dLAMBDA = t_154.permute(1, 0)
            t_156 = t_114[:, None] * dLAMBDA
            t_157 = torch.einsum("uv, uv -> u", LAMBDA, dLAMBDA)
            t_158 = t_157.mul_(t_114)
            dWFAR = -t_158
            dWP = t_156 + dWFAR[:, None]
            dZ = dWP * WP
            t_162 = torch.einsum("uv, vw -> uw", dZ, KBAR)
            t_163 = dDELTA.sum(1)
            t_164 = torch.einsum("uv, uvw -> uw", dXI, CK)
            dNP = t_143.permute(0, 2, 1)
            t_166 = dXI[:, :, None] * MU[:, None, :]
            dC = s * t_140
            dCK = -s * t_166 + dC
            dKP = dCK * t_102[:, :, None]
            t_170 = t_109 * dWP
            t_171 = t_170.masked_fill_(hidden, 0)
            t_172 = torch.einsum("uvw, uvw -> uv", dCK, CK)
            t_173 = t_172.mul_(t_102)
            dDP = t_171 + t_146 - t_173
            dMB = dMB + torch.einsum("uv, uwx -> vwx", LAMBDA, dMA)
            t_178 = t_178 + torch.einsum("uv, uw -> vw", dZ, MU)
            t_179 = t_179 + dC.sum(0)
            operand_6 = side_by_side((B, A,), dNP.permute(1, 0, 2), dKP.permute(1, 0, 2), dDP.permute(1, 0)[:, :, None])
            t_187_sums = Q.new_zeros(slots, A, padded(d))
            dKP_wide = wide(dKP)
            dNP_wide = wide(dNP)
            MU_wide = wide(MU)
            call("key_tiles_3", (operand_6, operand_7_packed, OMEGA, KAPPA_wide, t_187_sums, dKP_wide, t_190_sums, dNP_wide,
                t_193_sums, MU_wide, t_196_sums,), (slots, A, B, T_q, T_k, operand_6.shape[-1], operand_7_packed.shape[-2],
                KAPPA_wide.shape[-1], t_187_sums.shape[-1], dKP_wide.shape[-1], t_190_sums.shape[-1], dNP_wide.shape[-1],
                t_193_sums.shape[-1], MU_wide.shape[-1], t_196_sums.shape[-1],))
            t_187 = t_187_sums.sum(0)[..., :d]
            dMU = s * t_162 - t_163 - s * t_164 + s * t_187
            t_199 = dMU[None, :, :] * W_Q.permute(1, 0)[:, :, None]
            operand_8 = side_by_side((A, T_q,), s * LOG2E * Q, -1 * LOG2E * SHIFT[:, :, None])
            operand_10 = side_by_side((A, T_q,), dN, dD[:, :, None])
            t_215_sums = Q.new_zeros(A, T_q, padded(d))
            call("near_pairs_4", (operand_8, operand_9_packed, operand_10, operand_11_packed, K_wide, t_215_sums, Q_wide,
                t_217_sums, dN_wide, t_219_sums, first, column,), (slots, A, B, T_q, T_k, operand_8.shape[-1],
                operand_9_packed.shape[-2], operand_10.shape[-1], operand_11_packed.shape[-2], K_wide.shape[-1],
                t_215_sums.shape[-1], Q_wide.shape[-1], t_217_sums.shape[-1], dN_wide.shape[-1], t_219_sums.shape[-1],))
            t_215 = t_215_sums[..., :d].permute(1, 2, 0)
            t_221 = dDELTA + s * t_135.permute(1, 0, 2) + t_199.permute(1, 0, 2) + s * t_215.permute(2, 0, 1)
            outputs["dQ"][h, tiles] = t_221
        t_176 = torch.einsum("uvw, uxw -> uxv", dMB, V).permute(1, 0, 2)
        t_177 = t_176.mul_(W_K.permute(1, 0)[:, :, None])
        t_180 = torch.einsum("uvw, uxv -> uxw", dMB, KAPPA).permute(1, 0, 2)
        t_181 = t_180.mul_(W_K.permute(1, 0)[:, :, None])
        t_190 = t_190_sums[..., :d].permute(1, 0, 2)
        t_193 = t_193_sums[..., :e].permute(1, 0, 2)
        t_196 = t_196_sums[..., :d].permute(1, 0, 2)
        dKAPPA = t_177.permute(1, 0, 2) + t_190.permute(1, 0, 2) + s * t_196.permute(1, 0, 2)
        t_201 = dKAPPA.sum(1)
        dKBAR = s * t_178 + t_179 - t_201
        t_203 = W_K.permute(1, 0)[:, :, None] * dKBAR[None, :, :]
        t_217 = t_217_sums.sum(0)[..., :d].permute(1, 0, 2)
        t_219 = t_219_sums.sum(0)[..., :e].permute(1, 0, 2)
        t_222 = dKAPPA + t_203.permute(1, 0, 2) + s * t_217.permute(1, 0, 2)
        t_223 = t_219.permute(1, 0, 2) + t_181.permute(1, 0, 2) + t_193.permute(1, 0, 2)
        outputs["dK"][h] = t_222
        outputs["dV"][h] = t_223
    return outputs
