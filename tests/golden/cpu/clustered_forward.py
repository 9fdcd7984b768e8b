"""forward of attention, clustered, order 1, with exact pairs of tiles: O, D.

Tokens are in tiles: queries [H, A, T_q, ·], keys and values [H, B, T_k, ·]; inputs are FLOOR, K, Q, V, W_K, W_Q.
choose(head, tiles, values) says which pairs of tiles are near, and yields SHIFT, TOP where they are no inputs.
SHIFT and W_Q [H, I, T_q], TOP and FLOOR [H, I], W_K and LOG_B [H, J, T_k]; M_near [H, I, J], bool.

FLOPs per head: 2*d*e*n_k + 2*d*e*n_q + 2*d*n_k*n_q*ν + 3*d*n_k + 3*d*n_q + 2*e*n_k*n_q*ν + e*n_k + 5*e*n_q +
5*n_k*n_q*ν + 2*n_q + 4*d*n_k*n_q/T_q + 2*e*n_k*n_q/T_q + 3*n_k*n_q/T_q + 2*n_q/T_q + 2*d*n_k*n_q/T_k +
2*e*n_k*n_q/T_k + 7*n_k*n_q/T_k + 2*d*e*n_k*n_q/(T_k*T_q) + 6*d*n_k*n_q/(T_k*T_q) + 9*n_k*n_q/(T_k*T_q)
"""

import torch

LOG2E = 1.4426950408889634

SOURCE = r"""
#include "polyattn_tiles.h"

// tiles of keys: Y, OMEGA
extern "C" void key_tiles_1(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size scaled_MU_whole_columns = size[5];
  const Size KAPPA_packed_columns = size[6];
  const Size KAPPA_wide_columns = size[7];
  const Size KP_sums_columns = size[8];
  const Size V_wide_columns = size[9];
  const Size NP_sums_columns = size[10];
  const Size lanes = padded(T_k);
  float* const scaled_MU_whole = static_cast<float*>(tensor[0]);  // [A, columns]
  float* const KAPPA_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const DP_sums = static_cast<float*>(tensor[2]);  // [A, B]
  float* const KAPPA_wide = static_cast<float*>(tensor[3]);  // [B, T_k, columns]
  float* const KP_sums = static_cast<float*>(tensor[4]);  // [A, B, columns]
  float* const V_wide = static_cast<float*>(tensor[5]);  // [B, T_k, columns]
  float* const NP_sums = static_cast<float*>(tensor[6]);  // [A, B, columns]
#pragma omp parallel num_threads(threads)
  {
    Tile OMEGA_tile(T_k);
#pragma omp for schedule(dynamic)
    for (Size b = 0; b < B; ++b) {
      for (Size row = 0; row < A; row += CHUNK) {
        const Size rows = std::min(CHUNK, A - row);
        product(rows, lanes, [&](Vec Y, Size at) {
          const Vec OMEGA = exp2(Y);
          store(OMEGA_tile + at, OMEGA);
        }, Columns{scaled_MU_whole_columns, scaled_MU_whole + row * scaled_MU_whole_columns, scaled_MU_whole_columns,
            KAPPA_packed + b * KAPPA_packed_columns * lanes});
        sum_lanes(rows, T_k, OMEGA_tile, nullptr, DP_sums + row * B + b, B);
        sum_lanes(rows, T_k, OMEGA_tile, KAPPA_wide_columns, KAPPA_wide + b * T_k * KAPPA_wide_columns,
            KAPPA_wide_columns, KP_sums + (row * B + b) * KP_sums_columns, B * KP_sums_columns);
        sum_lanes(rows, T_k, OMEGA_tile, V_wide_columns, V_wide + b * T_k * V_wide_columns, V_wide_columns, NP_sums +
            (row * B + b) * NP_sums_columns, B * NP_sums_columns);
      }
    }
  }
}

// tiles of queries: X, E
extern "C" void query_tiles_2(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size scaled_Q_packed_columns = size[5];
  const Size C_whole_columns = size[6];
  const Size NP_wide_columns = size[7];
  const Size t_130_sums_columns = size[8];
  const Size lanes = padded(T_q);
  float* const scaled_Q_packed = static_cast<float*>(tensor[0]);  // [A, columns, lanes]
  float* const C_whole = static_cast<float*>(tensor[1]);  // [A, B, columns]
  float* const scaled_t_107_whole = static_cast<float*>(tensor[2]);  // [A, B]
  float* const scaled_SHIFT_wide = static_cast<float*>(tensor[3]);  // [A, lanes]
  float* const off = static_cast<float*>(tensor[4]);  // [A, B]
  float* const DP_whole = static_cast<float*>(tensor[5]);  // [A, B]
  float* const t_127_sums = static_cast<float*>(tensor[6]);  // [A, T_q]
  float* const NP_wide = static_cast<float*>(tensor[7]);  // [A, B, columns]
  float* const t_130_sums = static_cast<float*>(tensor[8]);  // [A, T_q, columns]
#pragma omp parallel num_threads(threads)
  {
    Tile E_tile(T_q);
#pragma omp for schedule(dynamic)
    for (Size a = 0; a < A; ++a) {
      for (Size row = 0; row < B; row += CHUNK) {
        const Size rows = std::min(CHUNK, B - row);
        product(rows, lanes, [&](Vec X, Size at) {
          const Vec E = exp2(X);
          store(E_tile + at, E);
        }, Columns{C_whole_columns, C_whole + (a * B + row) * C_whole_columns, C_whole_columns, scaled_Q_packed + a *
            scaled_Q_packed_columns * lanes}, Rows{scaled_t_107_whole + a * B + row, 1}, Lanes{scaled_SHIFT_wide + a *
            lanes}, Rows{off + a * B + row, 1});
        sum_rows(rows, T_q, E_tile, DP_whole + a * B + row, 1, t_127_sums + a * T_q);
        sum_rows(rows, T_q, E_tile, NP_wide_columns, NP_wide + (a * B + row) * NP_wide_columns, NP_wide_columns,
            t_130_sums + a * T_q * t_130_sums_columns, t_130_sums_columns);
      }
    }
  }
}

// near pairs of tiles: SN, PN
extern "C" void near_pairs_3(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size scaled_Q_whole_columns = size[5];
  const Size K_packed_columns = size[6];
  const Size V_wide_columns = size[7];
  const Size t_142_sums_columns = size[8];
  const Size lanes = padded(T_k);
  float* const scaled_Q_whole = static_cast<float*>(tensor[0]);  // [A, T_q, columns]
  float* const K_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const scaled_SHIFT_whole = static_cast<float*>(tensor[2]);  // [A, T_q]
  float* const t_140_sums = static_cast<float*>(tensor[3]);  // [A, T_q]
  float* const V_wide = static_cast<float*>(tensor[4]);  // [B, T_k, columns]
  float* const t_142_sums = static_cast<float*>(tensor[5]);  // [A, T_q, columns]
  const Size* const first = static_cast<Size*>(tensor[6]);
  const Size* const column = static_cast<Size*>(tensor[7]);
#pragma omp parallel num_threads(threads)
  {
    Tile PN_tile(T_k);
#pragma omp for schedule(dynamic)
    for (Size a = 0; a < A; ++a) {
      for (Size pair = first[a]; pair < first[a + 1]; ++pair) {
        const Size b = column[pair];
        for (Size row = 0; row < T_q; row += CHUNK) {
          const Size rows = std::min(CHUNK, T_q - row);
          product(rows, lanes, [&](Vec SN, Size at) {
            const Vec PN = exp2(SN);
            store(PN_tile + at, PN);
          }, Columns{scaled_Q_whole_columns, scaled_Q_whole + (a * T_q + row) * scaled_Q_whole_columns,
              scaled_Q_whole_columns, K_packed + b * K_packed_columns * lanes}, Rows{scaled_SHIFT_whole + a * T_q + row,
              1});
          sum_lanes(rows, T_k, PN_tile, nullptr, t_140_sums + a * T_q + row, 1);
          sum_lanes(rows, T_k, PN_tile, V_wide_columns, V_wide + b * T_k * V_wide_columns, V_wide_columns, t_142_sums +
              (a * T_q + row) * t_142_sums_columns, t_142_sums_columns);
        }
      }
    }
  }
}
"""


def padded(size):
    """The length of an axis that vectors run along, in memory."""
    return size + -size % 16


def packed(x):
    """The last two axes exchanged; the last one, along which vectors run, is padded."""
    return torch.nn.functional.pad(x.mT, (0, -x.shape[-2] % 16)).contiguous()


def whole(x):
    """A value in one piece."""
    return x.contiguous()


def wide(x):
    """A value in one piece whose last axis is padded."""
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
    outputs["O"] = Q.new_empty(H, all_tiles, T_q, e)
    outputs["D"] = Q.new_empty(H, all_tiles, T_q)
    for h in range(H):
        W_K = inputs["W_K"][h]
        K = inputs["K"][h]
        KBAR = torch.einsum("uv, uvw -> uw", W_K, K)
        KAPPA = K - KBAR[:, None, :]
        V = inputs["V"][h]
        t_85 = W_K.permute(1, 0)[:, :, None] * V.permute(1, 0, 2)
        t_86 = torch.einsum("uvw, vux -> vxw", t_85, KAPPA).permute(0, 2, 1)
        MB = t_86.permute(0, 2, 1)
        KAPPA_packed = packed(KAPPA)
        KAPPA_wide = wide(KAPPA)
        V_wide = wide(V)
        K_packed = packed(K)
        for at in range(0, all_tiles, block):
            tiles = slice(at, min(at + block, all_tiles))
            A = tiles.stop - tiles.start
            W_Q = inputs["W_Q"][h, tiles]
            Q = inputs["Q"][h, tiles]
            MU = torch.einsum("uv, uvw -> uw", W_Q, Q)
            t_88 = torch.einsum("uv, wv -> uw", MU, KBAR)
            FLOOR = inputs["FLOOR"][h, tiles]
            DELTA = Q - MU[:, None, :]
            scaled_MU_whole = whole(s * LOG2E * MU)
            DP_sums = Q.new_zeros(A, B)
            KP_sums = Q.new_zeros(A, B, padded(d))
            NP_sums = Q.new_zeros(A, B, padded(e))
            call("key_tiles_1", (scaled_MU_whole, KAPPA_packed, DP_sums, KAPPA_wide, KP_sums, V_wide, NP_sums,), (threads,
                A, B, T_q, T_k, scaled_MU_whole.shape[-1], KAPPA_packed.shape[-2], KAPPA_wide.shape[-1], KP_sums.shape[-1],
                V_wide.shape[-1], NP_sums.shape[-1],))
            DP = DP_sums
            KP = KP_sums[..., :d]
            NP = NP_sums[..., :e]
            t_103 = DP.reciprocal()
            CK = KP.mul_(t_103[:, :, None])
            chosen = choose(h, tiles, {"MU": MU, "KBAR": KBAR, "DP": DP, "CK": CK, "NP": NP})
            near, hidden = chosen["M_near"], ~chosen["M_far"]
            off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)
            first = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
            column = near.nonzero()[:, 1].contiguous()
            SHIFT = chosen["SHIFT"] if "SHIFT" in chosen else inputs["SHIFT"][h, tiles]
            C = KBAR[None, :, :] + CK
            t_107 = torch.einsum("uvw, uw -> uv", CK, -s * MU)
            TOP = chosen["TOP"] if "TOP" in chosen else inputs["TOP"][h, tiles]
            Z = s * t_88 - TOP[:, None]
            t_110 = Z.exp_()
            t_111 = t_110.masked_fill_(hidden, 0)
            WP = t_111.mul_(DP)
            t_113 = WP.sum(1)
            WFAR = t_113 + FLOOR
            t_115 = WFAR.reciprocal_()
            LAMBDA = t_115[:, None] * WP
            t_117 = torch.einsum("uvw, xu -> xvw", MB, LAMBDA).permute(1, 2, 0)
            MA = t_117.permute(2, 0, 1)
            t_119 = torch.einsum("uvw, uxv -> uxw", MA, DELTA).permute(1, 0, 2)
            scaled_Q_packed = packed(s * LOG2E * Q)
            C_whole = whole(C)
            scaled_t_107_whole = whole(LOG2E * t_107)
            scaled_SHIFT_wide = wide(-1 * LOG2E * SHIFT)
            DP_whole = whole(DP)
            t_127_sums = Q.new_zeros(A, T_q)
            NP_wide = wide(NP)
            t_130_sums = Q.new_zeros(A, T_q, padded(e))
            call("query_tiles_2", (scaled_Q_packed, C_whole, scaled_t_107_whole, scaled_SHIFT_wide, off, DP_whole,
                t_127_sums, NP_wide, t_130_sums,), (threads, A, B, T_q, T_k, scaled_Q_packed.shape[-2], C_whole.shape[-1],
                NP_wide.shape[-1], t_130_sums.shape[-1],))
            t_127 = t_127_sums.permute(1, 0)
            t_130 = t_130_sums[..., :e].permute(1, 0, 2)
            DFAR = t_127.permute(1, 0)
            NFAR = t_130.permute(1, 0, 2)
            t_134 = t_119.mul_(DFAR.permute(1, 0)[:, :, None])
            scaled_Q_whole = whole(s * LOG2E * Q)
            scaled_SHIFT_whole = whole(-1 * LOG2E * SHIFT)
            t_140_sums = Q.new_zeros(A, T_q)
            t_142_sums = Q.new_zeros(A, T_q, padded(e))
            call("near_pairs_3", (scaled_Q_whole, K_packed, scaled_SHIFT_whole, t_140_sums, V_wide, t_142_sums, first,
                column,), (threads, A, B, T_q, T_k, scaled_Q_whole.shape[-1], K_packed.shape[-2], V_wide.shape[-1],
                t_142_sums.shape[-1],))
            t_140 = t_140_sums
            t_142 = t_142_sums[..., :e].permute(1, 0, 2)
            D = t_140 + DFAR
            t_145 = D.reciprocal()
            N = t_142.permute(1, 0, 2) + NFAR + s * t_134.permute(1, 0, 2)
            t_147 = N.permute(1, 0, 2).mul_(t_145.permute(1, 0)[:, :, None])
            OUT = t_147.permute(1, 0, 2)
            outputs["O"][h, tiles] = OUT
            outputs["D"][h, tiles] = D
    return outputs
