// What stands in the place of the sections of dots.metal on an NVIDIA GPU.

// ---- Dot products --------------------------------------------------------------------------------

// This lane's part of the sum of all products of row 8 r + at.col + e of t and of the block at p, which is zero
// outside rows x cols; runs: see in_runs.
template <int R, int C, typename P>
FUNC float tile_row_dot(
    const Tile<R, C>& t, int r, int e, P p, int row_step, int col_step, bool runs, int rows, int cols, Spot at) {
  const int row = 8 * r + at.col + e, col = C * at.row;
  const auto other = floats_read<C>(
      below(p + at.col * row_step + col * col_step, 8 * r + e, row_step), col_step, row < rows ? cols - col : 0, runs);
  float sum = 0.0f;
  HLA_UNROLL
  for (int c = 0; c < C; c++) sum += t.of[r][c][e] * other.of[c];
  return sum;
}

// This lane's part of the sum over all rows.
template <int R, int C, typename P>
FUNC float tile_dot(const Tile<R, C>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  float sum = 0.0f;
  if (whole_runs<R, C>(p, row_step, col_step, rows, cols)) {
    p += at.col * row_step + C * at.row;
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) {
      const auto other = Floats<C>::read(below(p, i / 2 * 8 + i % 2, row_step));
      HLA_UNROLL
      for (int c = 0; c < C; c++) sum += t.of[i / 2][c][i % 2] * other.of[c];
    }
  } else {
    const Spot here = {hidden(at.row), hidden(at.col)};
    HLA_UNROLL
    for (int i = 0; i < 2 * R; i++) {
      sum += tile_row_dot(t, i / 2, i % 2, p, row_step, col_step, false, rows, cols, here);
    }
  }
  return sum;
}

// sums[r] = the dot product of row r of both. The 8 lanes of a row add up 2R sums of theirs: each gives away those of
// one half and goes on with the other.
template <int R, int C, typename P>
FUNC void tile_dot_rows(
    float* sums, const Tile<R, C>& t, P p, int row_step, int col_step, bool runs, int rows, int cols, Spot at) {
  float of[2 * R];
  HLA_UNROLL
  for (int i = 0; i < 2 * R; i++) of[i] = tile_row_dot(t, i / 2, i % 2, p, row_step, col_step, runs, rows, cols, at);
  int first = 0;
  HLA_UNROLL
  for (int half = R, bit = 4; bit > 0; bit /= 2, half /= 2) {
    const bool upper = (at.row & bit) != 0;
    HLA_UNROLL
    for (int i = 0; i < (half > 0 ? half : 1); i++) {
      const float give = half > 0 && !upper ? of[i + half] : of[i], keep = half > 0 && upper ? of[i + half] : of[i];
      of[i] = keep + lane_across(give, 4 * bit);
    }
    first += upper ? half : 0;
  }
  constexpr int SPARE = R < 4 ? 4 / R - 1 : 0;  // bits of lanes that have the same sum
  if ((at.row & SPARE) == 0) sums[8 * (first / 2) + at.col + first % 2] = of[0];
}

// ---- Products of scores --------------------------------------------------------------------------

// In blocks of 16 x 8, or one of 8 x 8: what of them is above the diagonal is zero.
template <int K, bool DECAY, int W, int V, typename PX, typename PY, typename PD, typename PZ>
FUNC void two_scores(
    Score* ps, Score* ms, int ldp, PX x, int ldx, PY y, int ldy, PD d, int ldd, PZ z, int ldz, const Decays<W>& cum,
    const Pair* least, Parts<V>& parts, float power, float scale, float own, Launch launch, Spot at) {
  constexpr int R = W / 8, B = (W + 15) / 16, ROWS = W < 16 ? 1 : 2;
  for (int n = launch.simdgroup; n < (W < 16 ? 1 : B * (B + 1)); n += launch.threads / 32) {
    int I = 0, J = n;  // the block's rows are those from 16 I on, its columns those from 8 J on
    while (J >= 2 * (I + 1)) J -= 2 * ++I;
    float xy[1][2][2] = {}, dz[1][2][2] = {};
    block_mma<K, ROWS>(xy, x + 16 * I * ldx, ldx, y + 8 * J * ldy, ldy, at);
    block_mma<K, ROWS>(dz, d + 16 * I * ldd, ldd, z + 8 * J * ldz, ldz, at);
    const int col = 8 * J + at.col;
    float col_sums[2][2];
    HLA_UNROLL
    for (int h = 0; h < ROWS; h++) {
      const int row = 16 * I + 8 * h + at.row;
      Floats<2> left, right;
      float pair[2] = {0.0f, 0.0f};
      HLA_UNROLL
      for (int e = 0; e < 2; e++) {
        const bool causal = col + e <= row, before = col + e < row;
        const float between = causal ? scale * decay_between(cum.sums[row], cum.sums[col + e], power) : 0.0f;
        left.of[e] = between * xy[0][h][e];
        right.of[e] = between * dz[0][h][e];
        if (DECAY) {
          const float part = own * xy[0][h][e] * dz[0][h][e] * decay_between(least[row], least[col + e], power);
          pair[e] = before ? part : 0.0f;
        }
      }
      Floats<2>::write<Score>(ps + row * ldp + col, left);
      Floats<2>::write<Score>(ms + row * ldp + col, right);
      if (DECAY) {
        const float row_total = row_sum(pair[0] + pair[1]);
        if (at.col == 0) parts.by_row[row * R + J] = row_total;
        if (2 * I + h == J) {
          parts.diagonal[8 * row + at.col] = pair[0];
          parts.diagonal[8 * row + at.col + 1] = pair[1];
        }
        HLA_UNROLL
        for (int e = 0; e < 2; e++) col_sums[h][e] = col_sum(pair[e]);
        if (at.row == 0) {
          parts.by_col[col * R + 2 * I + h] = col_sums[h][0];
          parts.by_col[(col + 1) * R + 2 * I + h] = col_sums[h][1];
        }
      }
    }
  }
}
