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
  float* const OMEGA = static_cast<float*>(tensor[7]);  // [B, A, lanes]
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (Size b = 0; b < B; ++b) {
      for (Size row = 0; row < A; row += CHUNK) {
        const Size rows = std::min(CHUNK, A - row);
        float* const OMEGA_tile = OMEGA + (b * A + row) * lanes;
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

// tiles of queries: X, dE, E, dX
extern "C" void query_tiles_2(void* const* tensor, const Size* size, const double* number) {
  const Size threads = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size scaled_Q_packed_columns = size[5];
  const Size C_whole_columns = size[6];
  const Size dN_packed_columns = size[7];
  const Size NP_whole_columns = size[8];
  const Size C_wide_columns = size[9];
  const Size t_146_sums_columns = size[10];
  const Size Q_wide_columns = size[11];
  const Size t_151_sums_columns = size[12];
  const Size dN_wide_columns = size[13];
  const Size t_154_sums_columns = size[14];
  const Size lanes = padded(T_q);
  float* const scaled_Q_packed = static_cast<float*>(tensor[0]);  // [A, columns, lanes]
  float* const C_whole = static_cast<float*>(tensor[1]);  // [A, B, columns]
  float* const scaled_t_115_whole = static_cast<float*>(tensor[2]);  // [A, B]
  float* const scaled_SHIFT_wide = static_cast<float*>(tensor[3]);  // [A, lanes]
  float* const off = static_cast<float*>(tensor[4]);  // [A, B]
  float* const dN_packed = static_cast<float*>(tensor[5]);  // [A, columns, lanes]
  float* const NP_whole = static_cast<float*>(tensor[6]);  // [A, B, columns]
  float* const dDFAR_wide = static_cast<float*>(tensor[7]);  // [A, lanes]
  float* const DP_whole = static_cast<float*>(tensor[8]);  // [A, B]
  float* const t_143_sums = static_cast<float*>(tensor[9]);  // [A, T_q]
  float* const C_wide = static_cast<float*>(tensor[10]);  // [A, B, columns]
  float* const t_146_sums = static_cast<float*>(tensor[11]);  // [A, T_q, columns]
  float* const dXI_sums = static_cast<float*>(tensor[12]);  // [A, B]
  float* const Q_wide = static_cast<float*>(tensor[13]);  // [A, T_q, columns]
  float* const t_151_sums = static_cast<float*>(tensor[14]);  // [A, B, columns]
  float* const dN_wide = static_cast<float*>(tensor[15]);  // [A, T_q, columns]
  float* const t_154_sums = static_cast<float*>(tensor[16]);  // [A, B, columns]
  float* const dDFAR_whole = static_cast<float*>(tensor[17]);  // [A, T_q]
  float* const t_157_sums = static_cast<float*>(tensor[18]);  // [A, B]
#pragma omp parallel num_threads(threads)
  {
    Tile E_tile(T_q);
    Tile dX_tile(T_q);
#pragma omp for schedule(dynamic)
    for (Size a = 0; a < A; ++a) {
      for (Size row = 0; row < B; row += CHUNK) {
        const Size rows = std::min(CHUNK, B - row);
        product(rows, lanes, [&](Vec X, Size at) {
          const Vec E = exp2(X);
          store(E_tile + at, E);
        }, Columns{C_whole_columns, C_whole + (a * B + row) * C_whole_columns, C_whole_columns, scaled_Q_packed + a *
            scaled_Q_packed_columns * lanes}, Rows{scaled_t_115_whole + a * B + row, 1}, Lanes{scaled_SHIFT_wide + a *
            lanes}, Rows{off + a * B + row, 1});
        product(rows, lanes, [&](Vec dE, Size at) {
          const Vec dX = dE * load(E_tile + at);
          store(dX_tile + at, dX);
        }, Columns{NP_whole_columns, NP_whole + (a * B + row) * NP_whole_columns, NP_whole_columns, dN_packed + a *
            dN_packed_columns * lanes}, RowsLanes{DP_whole + a * B + row, 1, dDFAR_wide + a * lanes});
        sum_rows(rows, T_q, E_tile, DP_whole + a * B + row, 1, t_143_sums + a * T_q);
        sum_rows(rows, T_q, dX_tile, C_wide_columns, C_wide + (a * B + row) * C_wide_columns, C_wide_columns, t_146_sums
            + a * T_q * t_146_sums_columns, t_146_sums_columns);
        sum_lanes(rows, T_q, dX_tile, nullptr, dXI_sums + a * B + row, 1);
        sum_lanes(rows, T_q, dX_tile, Q_wide_columns, Q_wide + a * T_q * Q_wide_columns, Q_wide_columns, t_151_sums + (a
            * B + row) * t_151_sums_columns, t_151_sums_columns);
        sum_lanes(rows, T_q, E_tile, dN_wide_columns, dN_wide + a * T_q * dN_wide_columns, dN_wide_columns, t_154_sums +
            (a * B + row) * t_154_sums_columns, t_154_sums_columns);
        sum_lanes(rows, T_q, E_tile, dDFAR_whole + a * T_q, t_157_sums + a * B + row, 1);
      }
    }
  }
}

// tiles of keys: dOMEGA, dY
extern "C" void key_tiles_3(void* const* tensor, const Size* size, const double* number) {
  const Size slots = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size dNP_whole_columns = size[5];
  const Size V_packed_columns = size[6];
  const Size dKP_whole_columns = size[7];
  const Size KAPPA_packed_columns = size[8];
  const Size KAPPA_wide_columns = size[9];
  const Size t_199_sums_columns = size[10];
  const Size dKP_wide_columns = size[11];
  const Size t_202_sums_columns = size[12];
  const Size dNP_wide_columns = size[13];
  const Size t_205_sums_columns = size[14];
  const Size MU_wide_columns = size[15];
  const Size t_208_sums_columns = size[16];
  const Size lanes = padded(T_k);
  float* const dNP_whole = static_cast<float*>(tensor[0]);  // [A, B, columns]
  float* const V_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const dKP_whole = static_cast<float*>(tensor[2]);  // [A, B, columns]
  float* const KAPPA_packed = static_cast<float*>(tensor[3]);  // [B, columns, lanes]
  float* const dDP_whole = static_cast<float*>(tensor[4]);  // [A, B]
  float* const OMEGA = static_cast<float*>(tensor[5]);  // [B, A, lanes]
  float* const KAPPA_wide = static_cast<float*>(tensor[6]);  // [B, T_k, columns]
  float* const t_199_sums = static_cast<float*>(tensor[7]);  // [slots, A, columns]
  float* const dKP_wide = static_cast<float*>(tensor[8]);  // [A, B, columns]
  float* const t_202_sums = static_cast<float*>(tensor[9]);  // [B, T_k, columns]
  float* const dNP_wide = static_cast<float*>(tensor[10]);  // [A, B, columns]
  float* const t_205_sums = static_cast<float*>(tensor[11]);  // [B, T_k, columns]
  float* const MU_wide = static_cast<float*>(tensor[12]);  // [A, columns]
  float* const t_208_sums = static_cast<float*>(tensor[13]);  // [B, T_k, columns]
#pragma omp parallel num_threads(slots)
  {
    Tile dY_tile(T_k);
#pragma omp for schedule(static, 1)
    for (Size slot = 0; slot < slots; ++slot)
      for (Size b = slot * B / slots, end = (slot + 1) * B / slots; b < end; ++b) {
        for (Size row = 0; row < A; row += CHUNK) {
          const Size rows = std::min(CHUNK, A - row);
          float* const OMEGA_tile = OMEGA + (b * A + row) * lanes;
          product(rows, lanes, [&](Vec dOMEGA, Size at) {
            const Vec dY = load(OMEGA_tile + at) * dOMEGA;
            store(dY_tile + at, dY);
          }, Columns{dNP_whole_columns, dNP_whole + (row * B + b) * dNP_whole_columns, B * dNP_whole_columns, V_packed +
              b * V_packed_columns * lanes}, Columns{dKP_whole_columns, dKP_whole + (row * B + b) * dKP_whole_columns, B
              * dKP_whole_columns, KAPPA_packed + b * KAPPA_packed_columns * lanes}, Rows{dDP_whole + row * B + b, B});
          sum_lanes(rows, T_k, dY_tile, KAPPA_wide_columns, KAPPA_wide + b * T_k * KAPPA_wide_columns,
              KAPPA_wide_columns, t_199_sums + (slot * A + row) * t_199_sums_columns, t_199_sums_columns);
          sum_rows(rows, T_k, OMEGA_tile, dKP_wide_columns, dKP_wide + (row * B + b) * dKP_wide_columns, B *
              dKP_wide_columns, t_202_sums + b * T_k * t_202_sums_columns, t_202_sums_columns);
          sum_rows(rows, T_k, OMEGA_tile, dNP_wide_columns, dNP_wide + (row * B + b) * dNP_wide_columns, B *
              dNP_wide_columns, t_205_sums + b * T_k * t_205_sums_columns, t_205_sums_columns);
          sum_rows(rows, T_k, dY_tile, MU_wide_columns, MU_wide + row * MU_wide_columns, MU_wide_columns, t_208_sums + b
              * T_k * t_208_sums_columns, t_208_sums_columns);
        }
      }
  }
}

// near pairs of tiles: SN, dPN, PN, dSN
extern "C" void near_pairs_4(void* const* tensor, const Size* size, const double* number) {
  const Size slots = size[0], A = size[1], B = size[2], T_q = size[3], T_k = size[4];
  const Size scaled_Q_whole_columns = size[5];
  const Size K_packed_columns = size[6];
  const Size dN_whole_columns = size[7];
  const Size V_packed_columns = size[8];
  const Size K_wide_columns = size[9];
  const Size t_226_sums_columns = size[10];
  const Size Q_wide_columns = size[11];
  const Size t_228_sums_columns = size[12];
  const Size dN_wide_columns = size[13];
  const Size t_230_sums_columns = size[14];
  const Size lanes = padded(T_k);
  float* const scaled_Q_whole = static_cast<float*>(tensor[0]);  // [A, T_q, columns]
  float* const K_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const scaled_SHIFT_whole = static_cast<float*>(tensor[2]);  // [A, T_q]
  float* const dN_whole = static_cast<float*>(tensor[3]);  // [A, T_q, columns]
  float* const V_packed = static_cast<float*>(tensor[4]);  // [B, columns, lanes]
  float* const dD_whole = static_cast<float*>(tensor[5]);  // [A, T_q]
  float* const K_wide = static_cast<float*>(tensor[6]);  // [B, T_k, columns]
  float* const t_226_sums = static_cast<float*>(tensor[7]);  // [A, T_q, columns]
  float* const Q_wide = static_cast<float*>(tensor[8]);  // [A, T_q, columns]
  float* const t_228_sums = static_cast<float*>(tensor[9]);  // [slots, B, T_k, columns]
  float* const dN_wide = static_cast<float*>(tensor[10]);  // [A, T_q, columns]
  float* const t_230_sums = static_cast<float*>(tensor[11]);  // [slots, B, T_k, columns]
  const Size* const first = static_cast<Size*>(tensor[12]);
  const Size* const column = static_cast<Size*>(tensor[13]);
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
            product(rows, lanes, [&](Vec SN, Size at) {
              const Vec PN = exp2(SN);
              store(PN_tile + at, PN);
            }, Columns{scaled_Q_whole_columns, scaled_Q_whole + (a * T_q + row) * scaled_Q_whole_columns,
                scaled_Q_whole_columns, K_packed + b * K_packed_columns * lanes}, Rows{scaled_SHIFT_whole + a * T_q +
                row, 1});
            product(rows, lanes, [&](Vec dPN, Size at) {
              const Vec dSN = load(PN_tile + at) * dPN;
              store(dSN_tile + at, dSN);
            }, Columns{dN_whole_columns, dN_whole + (a * T_q + row) * dN_whole_columns, dN_whole_columns, V_packed + b *
                V_packed_columns * lanes}, Rows{dD_whole + a * T_q + row, 1});
            sum_lanes(rows, T_k, dSN_tile, K_wide_columns, K_wide + b * T_k * K_wide_columns, K_wide_columns, t_226_sums
                + (a * T_q + row) * t_226_sums_columns, t_226_sums_columns);
            sum_rows(rows, T_k, dSN_tile, Q_wide_columns, Q_wide + (a * T_q + row) * Q_wide_columns, Q_wide_columns,
                t_228_sums + (slot * B + b) * T_k * t_228_sums_columns, t_228_sums_columns);
            sum_rows(rows, T_k, PN_tile, dN_wide_columns, dN_wide + (a * T_q + row) * dN_wide_columns, dN_wide_columns,
                t_230_sums + (slot * B + b) * T_k * t_230_sums_columns, t_230_sums_columns);
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
    outputs["dQ"] = Q.new_empty(H, all_tiles, T_q, d)
    outputs["dK"] = Q.new_empty(H, B, T_k, d)
    outputs["dV"] = Q.new_empty(H, B, T_k, e)
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
        V_packed = packed(V)
        K_packed = packed(K)
        K_wide = wide(K)
        dMB = 0
        t_189 = 0
        t_190 = 0
        t_202_sums = Q.new_zeros(B, T_k, padded(d))
        t_205_sums = Q.new_zeros(B, T_k, padded(e))
        t_208_sums = Q.new_zeros(B, T_k, padded(d))
        t_228_sums = Q.new_zeros(slots, B, T_k, padded(d))
        t_230_sums = Q.new_zeros(slots, B, T_k, padded(e))
        for at in range(0, all_tiles, block):
            tiles = slice(at, min(at + block, all_tiles))
            A = tiles.stop - tiles.start
            W_Q = inputs["W_Q"][h, tiles]
            Q = inputs["Q"][h, tiles]
            MU = torch.einsum("uv, uvw -> uw", W_Q, Q)
            t_88 = torch.einsum("uv, wv -> uw", MU, KBAR)
            FLOOR = inputs["FLOOR"][h, tiles]
            D = inputs["D"][h, tiles]
            t_91 = D.reciprocal()
            G = inputs["G"][h, tiles]
            t_93 = t_91.permute(1, 0)[:, :, None] * G.permute(1, 0, 2)
            dN = t_93.permute(1, 0, 2)
            DELTA = Q - MU[:, None, :]
            OUT = inputs["O"][h, tiles]
            t_97 = torch.einsum("uvw, uvw -> uv", OUT, G).permute(1, 0)
            t_98 = t_97.mul_(t_91.permute(1, 0))
            dD = -t_98.permute(1, 0)
            scaled_MU_whole = whole(s * LOG2E * MU)
            DP_sums = Q.new_zeros(A, B)
            KP_sums = Q.new_zeros(A, B, padded(d))
            NP_sums = Q.new_zeros(A, B, padded(e))
            OMEGA = Q.new_empty(B, A, padded(T_k))
            call("key_tiles_1", (scaled_MU_whole, KAPPA_packed, DP_sums, KAPPA_wide, KP_sums, V_wide, NP_sums, OMEGA,),
                (threads, A, B, T_q, T_k, scaled_MU_whole.shape[-1], KAPPA_packed.shape[-2], KAPPA_wide.shape[-1],
                KP_sums.shape[-1], V_wide.shape[-1], NP_sums.shape[-1],))
            DP = DP_sums
            KP = KP_sums[..., :d]
            NP = NP_sums[..., :e]
            t_112 = DP.reciprocal()
            CK = KP.mul_(t_112[:, :, None])
            chosen = choose(h, tiles, {"MU": MU, "KBAR": KBAR, "DP": DP, "CK": CK, "NP": NP})
            near, hidden = chosen["M_near"], ~chosen["M_far"]
            off = Q.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(Q.dtype).min / 2)
            first = torch.nn.functional.pad(near.sum(1).cumsum(0), (1, 0))
            column = near.nonzero()[:, 1].contiguous()
            C = KBAR[None, :, :] + CK
            t_115 = torch.einsum("uvw, uw -> uv", CK, -s * MU)
            SHIFT = chosen["SHIFT"] if "SHIFT" in chosen else inputs["SHIFT"][h, tiles]
            TOP = chosen["TOP"] if "TOP" in chosen else inputs["TOP"][h, tiles]
            Z = s * t_88 - TOP[:, None]
            t_119 = Z.exp_()
            t_120 = t_119.masked_fill(hidden, 0)
            WP = t_120.mul_(DP)
            t_122 = WP.sum(1)
            WFAR = t_122 + FLOOR
            t_124 = WFAR.reciprocal_()
            LAMBDA = t_124[:, None] * WP
            t_126 = torch.einsum("uvw, xu -> xvw", MB, LAMBDA).permute(1, 2, 0)
            MA = t_126.permute(2, 0, 1)
            t_128 = torch.einsum("uvw, uxw -> uxv", MA, dN).permute(1, 0, 2)
            t_129 = torch.einsum("uvw, vuw -> uv", DELTA, t_128).permute(1, 0)
            dDFAR = s * t_129.permute(1, 0) + dD
            scaled_Q_packed = packed(s * LOG2E * Q)
            C_whole = whole(C)
            scaled_t_115_whole = whole(LOG2E * t_115)
            scaled_SHIFT_wide = wide(-1 * LOG2E * SHIFT)
            dN_packed = packed(dN)
            NP_whole = whole(NP)
            dDFAR_wide = wide(dDFAR)
            DP_whole = whole(DP)
            t_143_sums = Q.new_zeros(A, T_q)
            C_wide = wide(C)
            t_146_sums = Q.new_zeros(A, T_q, padded(d))
            dXI_sums = Q.new_zeros(A, B)
            Q_wide = wide(Q)
            t_151_sums = Q.new_zeros(A, B, padded(d))
            dN_wide = wide(dN)
            t_154_sums = Q.new_zeros(A, B, padded(e))
            dDFAR_whole = whole(dDFAR)
            t_157_sums = Q.new_zeros(A, B)
            call("query_tiles_2", (scaled_Q_packed, C_whole, scaled_t_115_whole, scaled_SHIFT_wide, off, dN_packed,
                NP_whole, dDFAR_wide, DP_whole, t_143_sums, C_wide, t_146_sums, dXI_sums, Q_wide, t_151_sums, dN_wide,
                t_154_sums, dDFAR_whole, t_157_sums,), (threads, A, B, T_q, T_k, scaled_Q_packed.shape[-2],
                C_whole.shape[-1], dN_packed.shape[-2], NP_whole.shape[-1], C_wide.shape[-1], t_146_sums.shape[-1],
                Q_wide.shape[-1], t_151_sums.shape[-1], dN_wide.shape[-1], t_154_sums.shape[-1],))
            t_143 = t_143_sums.permute(1, 0)
            t_146 = t_146_sums[..., :d].permute(1, 0, 2)
            dXI = dXI_sums
            t_151 = t_151_sums[..., :d]
            t_154 = t_154_sums[..., :e].permute(0, 2, 1)
            t_157 = t_157_sums
            DFAR = t_143.permute(1, 0)
            t_160 = DFAR.permute(1, 0)[:, :, None] * t_128
            dDELTA = s * t_160.permute(1, 0, 2)
            t_162 = dN.permute(1, 0, 2) * DFAR.permute(1, 0)[:, :, None]
            t_163 = torch.einsum("uvw, vux -> vxw", s * t_162, DELTA).permute(0, 2, 1)
            dMA = t_163.permute(0, 2, 1)
            t_165 = torch.einsum("uvw, xvw -> xu", MB, dMA).permute(1, 0)
            dLAMBDA = t_165.permute(1, 0)
            t_167 = t_124[:, None] * dLAMBDA
            t_168 = torch.einsum("uv, uv -> u", LAMBDA, dLAMBDA)
            t_169 = t_168.mul_(t_124)
            dWFAR = -t_169
            dWP = t_167 + dWFAR[:, None]
            dZ = dWP * WP
            t_173 = torch.einsum("uv, vw -> uw", dZ, KBAR)
            t_174 = dDELTA.sum(1)
            t_175 = torch.einsum("uv, uvw -> uw", dXI, CK)
            dNP = t_154.permute(0, 2, 1)
            t_177 = dXI[:, :, None] * MU[:, None, :]
            dC = s * t_151
            dCK = -s * t_177 + dC
            dKP = dCK * t_112[:, :, None]
            t_181 = t_119 * dWP
            t_182 = t_181.masked_fill_(hidden, 0)
            t_183 = torch.einsum("uvw, uvw -> uv", dCK, CK)
            t_184 = t_183.mul_(t_112)
            dDP = t_182 + t_157 - t_184
            dMB = dMB + torch.einsum("uv, uwx -> vwx", LAMBDA, dMA)
            t_189 = t_189 + torch.einsum("uv, uw -> vw", dZ, MU)
            t_190 = t_190 + dC.sum(0)
            dNP_whole = whole(dNP)
            dKP_whole = whole(dKP)
            dDP_whole = whole(dDP)
            t_199_sums = Q.new_zeros(slots, A, padded(d))
            dKP_wide = wide(dKP)
            dNP_wide = wide(dNP)
            MU_wide = wide(MU)
            call("key_tiles_3", (dNP_whole, V_packed, dKP_whole, KAPPA_packed, dDP_whole, OMEGA, KAPPA_wide, t_199_sums,
                dKP_wide, t_202_sums, dNP_wide, t_205_sums, MU_wide, t_208_sums,), (slots, A, B, T_q, T_k,
                dNP_whole.shape[-1], V_packed.shape[-2], dKP_whole.shape[-1], KAPPA_packed.shape[-2], KAPPA_wide.shape[-1],
                t_199_sums.shape[-1], dKP_wide.shape[-1], t_202_sums.shape[-1], dNP_wide.shape[-1], t_205_sums.shape[-1],
                MU_wide.shape[-1], t_208_sums.shape[-1],))
            t_199 = t_199_sums.sum(0)[..., :d]
            dMU = s * t_173 - t_174 - s * t_175 + s * t_199
            t_211 = dMU[None, :, :] * W_Q.permute(1, 0)[:, :, None]
            scaled_Q_whole = whole(s * LOG2E * Q)
            scaled_SHIFT_whole = whole(-1 * LOG2E * SHIFT)
            dN_whole = whole(dN)
            dD_whole = whole(dD)
            t_226_sums = Q.new_zeros(A, T_q, padded(d))
            call("near_pairs_4", (scaled_Q_whole, K_packed, scaled_SHIFT_whole, dN_whole, V_packed, dD_whole, K_wide,
                t_226_sums, Q_wide, t_228_sums, dN_wide, t_230_sums, first, column,), (slots, A, B, T_q, T_k,
                scaled_Q_whole.shape[-1], K_packed.shape[-2], dN_whole.shape[-1], V_packed.shape[-2], K_wide.shape[-1],
                t_226_sums.shape[-1], Q_wide.shape[-1], t_228_sums.shape[-1], dN_wide.shape[-1], t_230_sums.shape[-1],))
            t_226 = t_226_sums[..., :d].permute(1, 2, 0)
            t_232 = dDELTA + s * t_146.permute(1, 0, 2) + t_211.permute(1, 0, 2) + s * t_226.permute(2, 0, 1)
            outputs["dQ"][h, tiles] = t_232
        t_187 = torch.einsum("uvw, uxw -> uxv", dMB, V).permute(1, 0, 2)
        t_188 = t_187.mul_(W_K.permute(1, 0)[:, :, None])
        t_191 = torch.einsum("uvw, uxv -> uxw", dMB, KAPPA).permute(1, 0, 2)
        t_192 = t_191.mul_(W_K.permute(1, 0)[:, :, None])
        t_202 = t_202_sums[..., :d].permute(1, 0, 2)
        t_205 = t_205_sums[..., :e].permute(1, 0, 2)
        t_208 = t_208_sums[..., :d].permute(1, 0, 2)
        dKAPPA = t_188.permute(1, 0, 2) + t_202.permute(1, 0, 2) + s * t_208.permute(1, 0, 2)
        t_213 = dKAPPA.sum(1)
        dKBAR = s * t_189 + t_190 - t_213
        t_215 = W_K.permute(1, 0)[:, :, None] * dKBAR[None, :, :]
        t_228 = t_228_sums.sum(0)[..., :d].permute(1, 0, 2)
        t_230 = t_230_sums.sum(0)[..., :e].permute(1, 0, 2)
        t_233 = dKAPPA + t_215.permute(1, 0, 2) + s * t_228.permute(1, 0, 2)
        t_234 = t_230.permute(1, 0, 2) + t_192.permute(1, 0, 2) + t_205.permute(1, 0, 2)
        outputs["dK"][h] = t_233
        outputs["dV"][h] = t_234
    return outputs
