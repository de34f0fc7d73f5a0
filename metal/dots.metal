// Dot products of a tile with what lies in memory, row by row and in all. No kernels.

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
