// A chunk of W tokens: the decay inside it, scores of its tokens, how it comes to threadgroup memory; and what is
// symmetric in what it adds to a state.
//# uses: products

// ---- The decay inside a chunk --------------------------------------------------------------------
//
// The sums of a chunk hold lb g_0 + .. + lb g_r of its tokens, lb the logarithm to base 2, in two parts: each is split
// into a multiple of 2^-10, whose sums float32 holds exactly, and a rest below 2^-11. So a difference of two sums
// has no cancellation, and D_ij = 2^(sum_i - sum_j) is exact to rounding. lb 0 counts as -185, whose power is 0 in
// float32: an exact zero in the decay resets the state to exact zeros. A NaN stays one: so is everything that it
// decays, as in a step.

CONSTANT float LOG_ZERO = -185.0f;

// This lane's sum, of the decay g of token `lane` (1 beyond the chunk) and of all before it.
FUNC Pair decay_sum(float g, float log_least) {
  float l = log_two(g);
  if (g <= 0.0f || l < log_least) l = log_least;  // not max, which drops a NaN
  const float hi = rint(l * 1024.0f) * (1.0f / 1024.0f);
  return Pair(lanes_cumsum(hi), lanes_cumsum(l - hi));
}

// (product of g over the tokens after `from` up to `to`)^power
FUNC float decay_between(Pair to, Pair from, float power) {
  return exp_two(power * ((to[0] - from[0]) + (to[1] - from[1])));
}

FUNC float decay_since_start(Pair to, float power) { return exp_two(power * (to[0] + to[1])); }

// ---- Blocks of a triangle ------------------------------------------------------------------------

// The n-th block of a lower triangle, row by row.
FUNC Spot triangle_block(int n) {
  Spot block;
  block.row = 0;
  while (n > block.row) n -= ++block.row;
  block.col = n;
  return block;
}

// ---- The decay of rows ---------------------------------------------------------------------------
//
//     Decays<W>                  what a threadgroup keeps of the decays of W <= 32 tokens: `sums`
//     decays_put                 makes that, by the first simdgroup whose lane has the decay of token `lane`
//     chunk_decay<N>             (decay over the chunk)^(N power)
//     tile_decay_to_end<N>       row r of t times (decay from token r to the chunk's end)^(N power)
//     tile_decay_from_start<N>   row r of t times scale (decay from the chunk's start through token r)^(N power)
//
// `power` is the same in all of them.

template <int W>
struct Decays {
  Pair sums[W];
};

template <int W>
FUNC void decays_put(IN_SHARED Decays<W>& cum, float g, float, int lane) {
  const Pair sum = decay_sum(g, LOG_ZERO);
  if (lane < W) cum.sums[lane] = sum;
}

template <int N = 1, int W>
FUNC float chunk_decay(IN_SHARED const Decays<W>& cum, float power) {
  return decay_since_start(cum.sums[W - 1], N * power);
}

template <int N = 1, int R, int C, int W>
FUNC void tile_decay_to_end(OWN Tile<R, C>& t, IN_SHARED const Decays<W>& cum, float power, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    float by = decay_between(cum.sums[W - 1], cum.sums[8 * r + at.row], N * power);
    HLA_UNROLL
    for (int c = 0; c < C; c++) frag_scale(t.f[r][c], by);
  }
}

template <int N = 1, int R, int C, int W>
FUNC void tile_decay_from_start(
    OWN Tile<R, C>& t, IN_SHARED const Decays<W>& cum, float power, float scale, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    float by = scale * decay_since_start(cum.sums[8 * r + at.row], N * power);
    HLA_UNROLL
    for (int c = 0; c < C; c++) frag_scale(t.f[r][c], by);
  }
}

// ---- Scores --------------------------------------------------------------------------------------

// p = scale D^power (x y^T) on and below the diagonal of the W x W chunk, zero above it inside the
// diagonal blocks (the blocks above are neither written nor read). x and y in threadgroup memory,
// W rows of 8K. The blocks are dealt out to the simdgroups in turn.
template <int K, int W, typename PX, typename PY>
FUNC void scores(
    IN_SHARED Score* p, int ldp, PX x, int ldx, PY y, int ldy, IN_SHARED const Decays<W>& cum, float power,
    float scale, Launch launch, Spot at) {
  constexpr int B = W / 8;
  for (int n = launch.simdgroup; n < B * (B + 1) / 2; n += launch.threads / 32) {
    const Spot ij = triangle_block(n);
    Frag s = frag_zero();
    block_mma<K>(s, x + 8 * ij.row * ldx, ldx, y + 8 * ij.col * ldy, ldy, at);
    int row = 8 * ij.row + at.row, col = 8 * ij.col + at.col;
    Pair pair = frag_get(s);
    Pair to = cum.sums[row];
    Run<float, 2> run;
    run[0] = col <= row ? scale * pair[0] * decay_between(to, cum.sums[col], power) : 0.0f;
    run[1] = col + 1 <= row ? scale * pair[1] * decay_between(to, cum.sums[col + 1], power) : 0.0f;
    run_write(p + row * ldp + col, run);
  }
}

// ---- Staging -------------------------------------------------------------------------------------
//
// A kernel walks over its chunks so, AHEAD where it has room for two chunks' tiles:
//
//     for each chunk, AHEAD from one before the first on
//       AHEAD: sync_staged
//       stage the chunk that is next, which is this one unless AHEAD, and read its decays
//       unless AHEAD: stage_decay, sync_staged
//       work on this chunk, if it is one
//       AHEAD: stage_decay of the next; else, where some still read what is staged then, sync_threadgroup

// At token u of a block: the first token of the chunk that is next, the room for it, and that of the chunk at u.
struct Turn {
  int first, next, now;
};

template <bool AHEAD, int W>
FUNC Turn turn_of(int u) {
  Turn turn;
  turn.first = AHEAD ? u + W : u;
  turn.next = AHEAD ? turn.first / W % 2 : 0;
  turn.now = AHEAD ? 1 - turn.next : 0;
  return turn;
}

// The decay of this lane's token, if it is one of the first `rows`, for the first simdgroup. g is that of the first,
// that of the next lies `step` on.
template <typename P>
FUNC float lane_decay(P g, long step, int rows, Launch launch) {
  return launch.simdgroup == 0 && launch.lane < rows ? g[launch.lane * step] : 1.0f;
}

// What decays_put makes of it, to be read after the next barrier.
template <int W>
FUNC void stage_decay(IN_SHARED Decays<W>& cum, float decay, float power, Launch launch) {
  if (launch.simdgroup == 0) decays_put(cum, decay, power, launch.lane);
}

// ---- Rows to threadgroup memory ------------------------------------------------------------------

// The n-th place of a grid of COLS columns, row by row, and the place that lies `by` after another: a thread that
// goes through a grid so divides twice, not for every place.
template <int COLS>
FUNC Spot grid_spot(int n) {
  Spot spot;
  spot.row = n / COLS;
  spot.col = n % COLS;
  return spot;
}

template <int COLS>
FUNC Spot grid_after(Spot spot, Spot by) {
  spot.row += by.row;
  spot.col += by.col;
  if (spot.col >= COLS) {
    spot.col -= COLS;
    spot.row++;
  }
  return spot;
}

// dst (W rows of WIDTH, leading dimension ld) = the tokens t..t + rows of a head that lies at src, by the strides of
// its array; zero outside rows x cols; 16 bytes at a time where a row lies together at multiples of 16, as every row of
// a contiguous array does whose width is a multiple of 8.
template <int W, int WIDTH, typename T, typename P, typename S>
FUNC void stage(IN_SHARED T* dst, int ld, P src, S strides, int t, int rows, int cols, Launch launch) {
  constexpr int N = 16 / sizeof(T), PARTS = WIDTH / N;
  const int row_step = int(strides[1]), col_step = int(strides[3]);
  src += t * strides[1];
  if (cols == WIDTH && in_runs<N>(src, row_step, col_step, cols)) {
    const Spot by = grid_spot<PARTS>(launch.threads);
    for (Spot i = grid_spot<PARTS>(launch.index); i.row < W; i = grid_after<PARTS>(i, by)) {
      const int c = N * i.col;
      copy_sixteen(dst + i.row * ld + c, src + (i.row < rows ? i.row * row_step + c : 0), i.row < rows);
    }
  } else {
    const Spot by = grid_spot<WIDTH>(launch.threads);
    for (Spot i = grid_spot<WIDTH>(launch.index); i.row < W; i = grid_after<WIDTH>(i, by)) {
      const bool there = i.row < rows && i.col < cols;
      dst[i.row * ld + i.col] = there ? src[i.row * row_step + i.col * col_step] : static_cast<T>(0.0f);
    }
  }
}

// ---- Symmetric states ----------------------------------------------------------------------------

// What tile_mma_upper takes, from threadgroup memory: fragment c has the columns from 8c on.
template <int R, int C, typename P>
FUNC void tile_take_upper(OWN Tile<R, C>& t, P p, int ld, int cols, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      t.f[r][c] = frag_zero();
      if (8 * c < cols) t.f[r][c] = frags_read<1>(p + 8 * r * ld + 8 * c, ld, at).f[0];
    }
  }
}

// Write what tile_mma_upper made, and its mirror image, to a size x size matrix at p; size is even.
template <int R, int C, int G, typename P>
FUNC void tile_write_symmetric(OWN Tile<R, C, G>& t, P p, int size, int col0, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int row = 8 * r + at.row, col = col0 + 8 * c + at.col, diagonal = col0 + 8 * c - 8 * r;
      Pair pair = frag_get(t.f[r][c]);
      Run<float, 2> run;
      run[0] = pair[0];
      run[1] = pair[1];
      if (diagonal >= 0 && row < size && col < size) {
        run_write(p + row * size + col, run);
        if (diagonal > 0) {
          p[col * size + row] = pair[0];
          p[(col + 1) * size + row] = pair[1];
        }
      }
    }
  }
}
