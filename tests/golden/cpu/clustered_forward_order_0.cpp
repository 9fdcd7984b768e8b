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
  float* const scaled_LOG_B_wide = static_cast<float*>(tensor[2]);  // [B, lanes]
  float* const DP_sums = static_cast<float*>(tensor[3]);  // [A, B]
  float* const KAPPA_wide = static_cast<float*>(tensor[4]);  // [B, T_k, columns]
  float* const KP_sums = static_cast<float*>(tensor[5]);  // [A, B, columns]
  float* const V_wide = static_cast<float*>(tensor[6]);  // [B, T_k, columns]
  float* const NP_sums = static_cast<float*>(tensor[7]);  // [A, B, columns]
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
            KAPPA_packed + b * KAPPA_packed_columns * lanes}, Lanes{scaled_LOG_B_wide + b * lanes});
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
  const Size t_111_sums_columns = size[8];
  const Size lanes = padded(T_q);
  float* const scaled_Q_packed = static_cast<float*>(tensor[0]);  // [A, columns, lanes]
  float* const C_whole = static_cast<float*>(tensor[1]);  // [A, B, columns]
  float* const scaled_t_103_whole = static_cast<float*>(tensor[2]);  // [A, B]
  float* const scaled_SHIFT_wide = static_cast<float*>(tensor[3]);  // [A, lanes]
  float* const off = static_cast<float*>(tensor[4]);  // [A, B]
  float* const NP_wide = static_cast<float*>(tensor[5]);  // [A, B, columns]
  float* const t_111_sums = static_cast<float*>(tensor[6]);  // [A, T_q, columns]
  float* const DP_whole = static_cast<float*>(tensor[7]);  // [A, B]
  float* const t_114_sums = static_cast<float*>(tensor[8]);  // [A, T_q]
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
            scaled_Q_packed_columns * lanes}, Rows{scaled_t_103_whole + a * B + row, 1}, Lanes{scaled_SHIFT_wide + a *
            lanes}, Rows{off + a * B + row, 1});
        sum_rows(rows, T_q, E_tile, NP_wide_columns, NP_wide + (a * B + row) * NP_wide_columns, NP_wide_columns,
            t_111_sums + a * T_q * t_111_sums_columns, t_111_sums_columns);
        sum_rows(rows, T_q, E_tile, DP_whole + a * B + row, 1, t_114_sums + a * T_q);
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
  const Size t_123_sums_columns = size[8];
  const Size lanes = padded(T_k);
  float* const scaled_Q_whole = static_cast<float*>(tensor[0]);  // [A, T_q, columns]
  float* const K_packed = static_cast<float*>(tensor[1]);  // [B, columns, lanes]
  float* const scaled_SHIFT_whole = static_cast<float*>(tensor[2]);  // [A, T_q]
  float* const scaled_LOG_B_wide = static_cast<float*>(tensor[3]);  // [B, lanes]
  float* const V_wide = static_cast<float*>(tensor[4]);  // [B, T_k, columns]
  float* const t_123_sums = static_cast<float*>(tensor[5]);  // [A, T_q, columns]
  float* const t_125_sums = static_cast<float*>(tensor[6]);  // [A, T_q]
  const Size* const first = static_cast<Size*>(tensor[7]);
  const Size* const column = static_cast<Size*>(tensor[8]);
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
              1}, Lanes{scaled_LOG_B_wide + b * lanes});
          sum_lanes(rows, T_k, PN_tile, V_wide_columns, V_wide + b * T_k * V_wide_columns, V_wide_columns, t_123_sums +
              (a * T_q + row) * t_123_sums_columns, t_123_sums_columns);
          sum_lanes(rows, T_k, PN_tile, nullptr, t_125_sums + a * T_q + row, 1);
        }
      }
    }
  }
}
