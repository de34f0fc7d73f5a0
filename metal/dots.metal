// For the decay's gradient: dot products of a tile with what lies in memory, row by row and in all, and products of two
// matrices of scores, summed. No kernels.

// ---- Dot products --------------------------------------------------------------------------------

// This lane's part of the sum of all products of fragment row r of t and the block at p, which is zero
// outside rows x cols; runs: see in_runs.
template <int R, int C, int G, typename P>
FUNC float tile_row_dot(
    OWN Tile<R, C, G>& t, int r, P p, int row_step, int col_step, bool runs, int rows, int cols, Spot at) {
  const int row = woven_row<G>(r, at);
  const Floats<2 * C> mine = part_get(t, r);
  const Floats<2 * C> other = part_read<C>(p + row * row_step, col_step, cols, runs, row < rows, at);
  float sum = 0.0f;
  HLA_UNROLL
  for (int e = 0; e < 2 * C; e++) sum += mine.of[e] * other.of[e];
  return sum;
}

// This lane's part of the sum over all rows.
template <int R, int C, int G, typename P>
FUNC float tile_dot(OWN Tile<R, C, G>& t, P p, int row_step, int col_step, int rows, int cols, Spot at) {
  const bool runs = in_runs<2 * C>(p, row_step, col_step, cols);
  float sum = 0.0f;
  HLA_UNROLL
  for (int r = 0; r < R; r++) sum += tile_row_dot(t, r, p, row_step, col_step, runs, rows, cols, at);
  return sum;
}

// sums[r] = the dot product of row r of both.
template <int R, int C, typename P>
FUNC void tile_dot_rows(
    IN_SHARED float* sums, OWN Tile<R, C>& t, P p, int row_step, int col_step, bool runs, int rows, int cols,
    Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const float sum = row_sum(tile_row_dot(t, r, p, row_step, col_step, runs, rows, cols, at));
    if (at.col == 0) sums[8 * r + at.row] = sum;
  }
}

// ---- Sums of a triangle --------------------------------------------------------------------------

// Sums of a matrix M of W x W below its diagonal, in 8 x 8 blocks: of a row over the columns of a block, of a column
// over the rows of one; and the blocks on the diagonal.
template <int W>
struct Parts {
  float by_row[W * W / 8], by_col[W * W / 8], diagonal[W * 8];
};

// by_row[i][J] becomes the sum over the blocks of row i before J and `before`; that over the blocks below that of i is
// returned, of column i.
template <int W, int V>
FUNC float parts_gather(IN_SHARED Parts<V>& parts, int i, float before) {
  constexpr int R = W / 8;
  float sum = before, tail = 0.0f;
  HLA_UNROLL
  for (int n = 0; n < R; n++) {
    if (n <= i / 8) {
      const float block_sum = parts.by_row[i * R + n];
      parts.by_row[i * R + n] = sum;
      sum += block_sum;
    } else {
      tail += parts.by_col[i * R + n];
    }
  }
  return tail;
}

// The e-th of eight parts of the sum of writes[j] for j < i and of M in rows from i on and columns before i, after
// parts_gather of all tokens, with its tails.
template <int W, int V>
FUNC float parts_sum(
    IN_SHARED const Parts<V>& parts, IN_SHARED const float* writes, IN_SHARED const float* tails, int i, int e) {
  constexpr int R = W / 8;
  const int n = i / 8, row = 8 * n + e;
  float sum = 0.0f;
  HLA_UNROLL
  for (int m = 0; m < R; m++) {
    const int j = 8 * m + e;
    if (j < i) sum += writes[j];
    if (j >= i) sum += parts.by_row[j * R + n];
  }
  if (row < i) sum += tails[row];
  HLA_UNROLL
  for (int c = 0; c < 8; c++) {
    if (row >= i && 8 * n + c < i) sum += parts.diagonal[8 * row + c];
  }
  return sum;
}

// ---- Products of scores --------------------------------------------------------------------------

// ps = scale D^power (x y^T) and ms = scale D^power (d z^T) as `scores` makes them, and where DECAY the parts of
// M_ij = own (x_i . y_j) (d_i . z_j) D_ij^power, its D from `least`.
template <int K, bool DECAY, int W, int V, typename PX, typename PY, typename PD, typename PZ>
FUNC void two_scores(
    IN_SHARED Score* ps, IN_SHARED Score* ms, int ldp, PX x, int ldx, PY y, int ldy, PD d, int ldd, PZ z, int ldz,
    IN_SHARED const Decays<W>& cum, IN_SHARED const Pair* least, IN_SHARED Parts<V>& parts, float power, float scale,
    float own, Launch launch, Spot at) {
  constexpr int R = W / 8;
  for (int n = launch.simdgroup; n < R * (R + 1) / 2; n += launch.threads / 32) {
    const Spot ij = triangle_block(n);
    Frag xy = frag_zero(), dz = frag_zero();
    block_mma<K>(xy, x + 8 * ij.row * ldx, ldx, y + 8 * ij.col * ldy, ldy, at);
    block_mma<K>(dz, d + 8 * ij.row * ldd, ldd, z + 8 * ij.col * ldz, ldz, at);
    const int row = 8 * ij.row + at.row, col = 8 * ij.col + at.col;
    const Pair left = frag_get(xy), right = frag_get(dz);
    Pair pair;
    HLA_UNROLL
    for (int e = 0; e < 2; e++) {
      const bool causal = col + e <= row, before = col + e < row;
      const float between = causal ? scale * decay_between(cum.sums[row], cum.sums[col + e], power) : 0.0f;
      ps[row * ldp + col + e] = between * left[e];
      ms[row * ldp + col + e] = between * right[e];
      if (DECAY) {
        pair[e] = before ? own * left[e] * right[e] * decay_between(least[row], least[col + e], power) : 0.0f;
      }
    }
    if (DECAY) {
      if (ij.row == ij.col) {
        parts.diagonal[8 * row + at.col] = pair[0];
        parts.diagonal[8 * row + at.col + 1] = pair[1];
      }
      const float row_total = row_sum(pair[0] + pair[1]);
      const Pair col_total = Pair(col_sum(pair[0]), col_sum(pair[1]));
      if (at.col == 0) parts.by_row[row * R + ij.col] = row_total;
      if (at.row == 0) {
        parts.by_col[col * R + ij.row] = col_total[0];
        parts.by_col[(col + 1) * R + ij.row] = col_total[1];
      }
    }
  }
}
