// Matrix products of tiles.
//
// Layout of a product: the threadgroup's simdgroups divide the columns of the result. Simdgroup s owns
// the stripe of 8C columns from 8C s on, of the state, of the output and of the right operand, all in
// registers; left operands are read from threadgroup memory by everybody. So a state never leaves its
// registers while a threadgroup walks over chunks, and no product needs a reduction over simdgroups.

// ---- Products ------------------------------------------------------------------------------------
//
// The sum's index k goes outermost: between two products with one accumulator come those with all the others. The
// fences keep the compiler from loading the fragments of every k before the first product, which spills registers.

// A state of 8K rows; SYMMETRIC: one that tile_mma_upper makes.
template <int K, int C, bool SYMMETRIC = false>
using State = Tile<K, C, !SYMMETRIC && K % 2 == 0 ? 2 : 1>;

// c += A b with A (8R x 8K) in threadgroup memory at a, row-major with leading dimension ld;
// TURNED: A is the transpose of what lies there; CAUSAL: what lies there is zero above its diagonal blocks;
// EXACT: b is not to be rounded, as CUDA does in bfloat16 calls.
template <int R, int K, int C, bool TURNED, bool CAUSAL, bool EXACT = false, int GC, int GB, typename P>
FUNC void tile_mma(OWN Tile<R, C, GC>& c, P a, int ld, OWN Tile<K, C, GB>& b, Spot at) {
  static_assert(TURNED ? GB == 1 : GC == 1, "woven are the rows of the result or the terms of the sum");
  HLA_UNROLL
  for (int k = 0; k < K; k += GB) {
    fence_loads();
    if (TURNED) {
      HLA_UNROLL
      for (int r = 0; r < R; r += GC) {
        if (!CAUSAL || k >= r) {
          Woven<GC> x = frags_turned<GC>(a + 8 * k * ld + 8 * r, ld, at);
          HLA_UNROLL
          for (int g = 0; g < GC; g++) {
            HLA_UNROLL
            for (int j = 0; j < C; j++) frag_mma(c.f[r + g][j], x.f[g], b.f[k][j]);
          }
        }
      }
    } else {
      Woven<GB> x[R];
      HLA_UNROLL
      for (int r = 0; r < R; r++) {
        if (!CAUSAL || k <= r) x[r] = frags_read<GB>(a + 8 * r * ld + 8 * k, ld, at);
      }
      HLA_UNROLL
      for (int g = 0; g < GB; g++) {
        HLA_UNROLL
        for (int r = 0; r < R; r++) {
          HLA_UNROLL
          for (int j = 0; j < C; j++) {
            if (!CAUSAL || k <= r) frag_mma(c.f[r][j], x[r].f[g], b.f[k + g][j]);
          }
        }
      }
    }
  }
}

// The same for c += A^T b where the result is symmetric and c its columns from block `col` on, a block to a fragment:
// those below the diagonal are left out.
template <int R, int K, int C, int G, typename P>
FUNC void tile_mma_upper(OWN Tile<R, C, G>& c, P a, int ld, OWN Tile<K, C>& b, int col, Spot at) {
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    fence_loads();
    HLA_UNROLL
    for (int r = 0; r < R; r++) {
      if (r < col + C) {
        Frag x = frags_turned<1>(a + 8 * k * ld + 8 * r, ld, at).f[0];
        HLA_UNROLL
        for (int j = 0; j < C; j++) {
          if (r <= col + j) frag_mma(c.f[r][j], x, b.f[k][j]);
        }
      }
    }
  }
}

// c += x y^T for 8 rows of x and 8 rows of y, both 8K wide in threadgroup memory.
template <int K, typename PX, typename PY>
FUNC void block_mma(OWN Frag& c, PX x, int ldx, PY y, int ldy, Spot at) {
  constexpr int G = K % 4 == 0 ? 4 : K % 2 == 0 ? 2 : 1;
  Frag odd = frag_zero();
  HLA_UNROLL
  for (int k = 0; k < K; k += G) {
    fence_loads();
    Woven<G> a = frags_read<G>(x + 8 * k, ldx, at), b = frags_turned<G>(y + 8 * k, ldy, at);
    HLA_UNROLL
    for (int g = 0; g < G; g++) frag_mma((k + g) % 2 ? odd : c, a.f[g], b.f[g]);
  }
  const Pair sum = frag_get(c) + frag_get(odd);
  frag_set(c, sum[0], sum[1]);
}
