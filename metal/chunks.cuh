// What stands in the place of sections of chunks.metal on an NVIDIA GPU, where a tile's rows are two to a lane and
// what their decays come to is found once, for all lanes.

// ---- The decay of rows ---------------------------------------------------------------------------

// since[r], until[r]: the decay from the chunk's start through token r, and from it to the chunk's end, to the `power`.
template <int W>
struct Decays {
  Pair sums[W];
  float since[W], until[W];
};

template <int W>
FUNC void decays_put(Decays<W>& cum, float g, float power, int lane) {
  const Pair sum = decay_sum(g, LOG_ZERO);
  const Pair whole = Pair(lane_value(sum[0], W - 1), lane_value(sum[1], W - 1));
  if (lane < W) {
    cum.sums[lane] = sum;
    cum.since[lane] = decay_since_start(sum, power);
    cum.until[lane] = decay_between(whole, sum, power);
  }
}

template <int N>
FUNC float raised(float x) { return N == 1 ? x : N == 2 ? x * x : x * x * x; }

template <int N = 1, int W>
FUNC float chunk_decay(const Decays<W>& cum, float) { return raised<N>(cum.since[W - 1]); }

// Row r of t times by[r]^N and `scale`.
template <int N, int R, int C>
FUNC void tile_scale_rows(Tile<R, C>& t, const float* by, float scale, Spot at) {
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const auto pair = run_read<2>(by + 8 * r + at.col);
    HLA_UNROLL
    for (int e = 0; e < 2; e++) {
      const float factor = scale * raised<N>(pair[e]);
      HLA_UNROLL
      for (int c = 0; c < C; c++) t.of[r][c][e] *= factor;
    }
  }
}

template <int N = 1, int R, int C, int W>
FUNC void tile_decay_to_end(Tile<R, C>& t, const Decays<W>& cum, float, Spot at) {
  tile_scale_rows<N>(t, cum.until, 1.0f, at);
}

template <int N = 1, int R, int C, int W>
FUNC void tile_decay_from_start(Tile<R, C>& t, const Decays<W>& cum, float, float scale, Spot at) {
  tile_scale_rows<N>(t, cum.since, scale, at);
}

// ---- Scores --------------------------------------------------------------------------------------

// In blocks of 16 x 16, or one of 8 x 8: p is zero above the diagonal inside those on it.
template <int K, int W, typename PX, typename PY>
FUNC void scores(
    Score* p, int ldp, PX x, int ldx, PY y, int ldy, const Decays<W>& cum, float power, float scale, Launch launch,
    Spot at) {
  constexpr int B = (W + 15) / 16, N = W < 16 ? 1 : 2;
  for (int n = launch.simdgroup; n < B * (B + 1) / 2; n += launch.threads / 32) {
    const Spot ij = triangle_block(n);
    float sums[N][2][2] = {};
    block_mma<K, N>(sums, x + 16 * ij.row * ldx, ldx, y + 16 * ij.col * ldy, ldy, at);
    HLA_UNROLL
    for (int h = 0; h < N; h++) {
      const int row = 16 * ij.row + 8 * h + at.row;
      const Pair to = cum.sums[row];
      HLA_UNROLL
      for (int c = 0; c < N; c++) {
        const int col = 16 * ij.col + 8 * c + at.col;
        Floats<2> pair;
        HLA_UNROLL
        for (int e = 0; e < 2; e++) {
          const float between = decay_between(to, cum.sums[col + e], power);
          pair.of[e] = col + e <= row ? scale * sums[c][h][e] * between : 0.0f;
        }
        Floats<2>::write<Score>(p + row * ldp + col, pair);
      }
    }
  }
}

// ---- Rows to threadgroup memory ------------------------------------------------------------------

// How many threads there are is known where it pays, and the loop then unrolls.
template <int W, int WIDTH, typename T, typename P, typename S>
FUNC void stage(T* dst, int ld, P src, S strides, int t, int rows, int cols, Launch launch) {
  constexpr int N = 16 / sizeof(T), PARTS = WIDTH / N;
  const int row_step = int(strides[1]), col_step = int(strides[3]);
  const P first = below(src, t, row_step);
  if (cols == WIDTH && in_runs<N>(src, row_step, col_step, cols)) {
    HLA_UNROLL
    for (int n = 0; n < W * PARTS; n += launch.threads) {
      const unsigned i = n + launch.index;
      const int row = i / PARTS, c = i % PARTS * N;
      if (W * PARTS % launch.threads == 0 || i < W * PARTS) {
        copy_sixteen(dst + row * ld + c, first + (row < rows ? row * row_step : 0) + c, row < rows);
      }
    }
  } else {
#pragma unroll 1
    for (int i = hidden(launch.index); i < W * WIDTH; i += launch.threads) {
      const int row = i / WIDTH, c = i % WIDTH;
      const bool there = row < rows && c < cols;
      dst[row * ld + c] = there ? first[row * row_step + c * col_step] : static_cast<T>(0.0f);
    }
  }
}

// ---- Symmetric states ----------------------------------------------------------------------------

// What tile_mma_upper takes, from shared memory.
template <int R, int C, typename P>
FUNC void tile_take_upper(Tile<R, C>& t, P p, int ld, int cols, Spot at) { tile_take(t, p, ld, cols, at); }

// Write what tile_mma_upper made, and its mirror image, to a size x size matrix at p; size is even.
template <int R, int C, typename P>
FUNC void tile_write_symmetric(const Tile<R, C>& t, P p, int size, int col0, Spot at) {
  const int col = col0 + C * at.row;
  HLA_UNROLL
  for (int r = 0; r < R; r++) {
    const int row = 8 * r + at.col;
    if (col / 8 < r || row >= size || col >= size) continue;
    HLA_UNROLL
    for (int e = 0; e < 2; e++) Floats<C>::template write<float>(p + (row + e) * size + col, part_get(t, r, e));
    if (col / 8 > r) {
      HLA_UNROLL
      for (int c = 0; c < C; c++) {
        Floats<2> pair;
        pair.of[0] = t.of[r][c][0];
        pair.of[1] = t.of[r][c][1];
        Floats<2>::write<float>(p + (col + c) * size + row, pair);
      }
    }
  }
}
