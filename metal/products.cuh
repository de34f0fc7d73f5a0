// The products of products.metal on an NVIDIA GPU's tensor cores.
//
// A product c += A b is made turned, c^T += b^T A^T: a tile's columns are the 16 rows of an instruction's left operand
// and of its result (tiles.cuh), and rows of A, from shared memory, the 8 columns of its right one. It adds in float32.
//
// HLA_ROUNDED: the operands are bfloat16 and a step of the sum has 16 terms, two blocks; a float32 tile is rounded, or
// goes in as two numbers where it is added to a state. Else they are TF32, which is float32 with a mantissa of 11 bits,
// and a step has 8 terms: half types are exact in it, and a float32 operand goes in as two numbers, its first 11 bits
// and the rest, so that a product has two or three instructions and float32's accuracy.

// ---- Products ------------------------------------------------------------------------------------
//
//     STEP                   blocks of 8 terms in an instruction
//     Places<TWO>            what a lane has of one row of an operand, of a step's terms; TWO: in two parts
//     in_two<P>()            whether numbers of the type that P points to are cut in two
//     places_set             what it has of one of the blocks: the terms at.col and at.col + 1
//     places_read            what it has of one or two blocks of rows in shared memory
//     places_mma             an instruction of PARTS, the first being the rests' products; `upper` and `lower` are 8
//                            rows each of its left operand

template <bool TWO>
struct Places {
  unsigned first[2], rest[2];
};

#ifdef HLA_ROUNDED

CONSTANT bool ROUNDED = true;
CONSTANT int STEP = 2;

// Two numbers in bfloat16, rounded to nearest; the first in the lower half.
FUNC unsigned packed(float first, float second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// 8 x 8 numbers of 16 bits from shared memory, of which lane 4 g + t gets 2 t and 2 t + 1 of row g. Lane i < 8 names
// row i, of 16 bytes.
FUNC unsigned read_block(const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  unsigned mine;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(mine) : "r"(at) : "memory");
  return mine;
}

// The same of the block's transpose.
FUNC unsigned read_turned(const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  unsigned mine;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(mine) : "r"(at) : "memory");
  return mine;
}

// The same of four blocks: lane 8 n + i names row i of the n-th.
FUNC void read_blocks(unsigned* of, const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(of[0]), "=r"(of[1]), "=r"(of[2]), "=r"(of[3]) : "r"(at) : "memory");
}

FUNC void read_blocks_turned(unsigned* of, const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(of[0]), "=r"(of[1]), "=r"(of[2]), "=r"(of[3]) : "r"(at) : "memory");
}

FUNC void mma_bf16(float* top, float* bottom, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                   unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Of 8 terms.
FUNC void mma_half_bf16(float* top, float* bottom, unsigned a0, unsigned a1, unsigned b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
      : "r"(a0), "r"(a1), "r"(b0));
}

template <bool TWO>
FUNC void places_set(Places<TWO>& x, int block, float first, float second) {
  const unsigned both = x.first[block] = packed(first, second);
  if (TWO) x.rest[block] = packed(first - __uint_as_float(both << 16), second - __uint_as_float(both & 0xffff0000u));
}

template <typename P>
FUNC constexpr bool in_two() { return false; }

template <int PARTS, bool A, bool B>
FUNC void places_mma(int part, float (&top)[2], float (&bottom)[2], const Places<A>& upper, const Places<A>& lower,
                     const Places<B>& right, bool half) {
  static_assert(PARTS == (A ? 2 : 1), "what is read from shared memory is in one part");
  const auto& a = part + 1 < PARTS ? upper.rest : upper.first;
  const auto& b = part + 1 < PARTS ? lower.rest : lower.first;
  if (half) {
    mma_half_bf16(top, bottom, a[0], b[0], right.first[0]);
  } else {
    mma_bf16(top, bottom, a[0], b[0], a[1], b[1], right.first[0], right.first[1]);
  }
}

#else

CONSTANT bool ROUNDED = false;
CONSTANT int STEP = 1;

// x rounded to 11 bits, to nearest; ties away from zero.
FUNC unsigned tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// The terms are in no order: a lane's two are neighbours.
FUNC void mma_tf32(float* top, float* bottom, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                   unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top[0]), "+f"(top[1]), "+f"(bottom[0]), "+f"(bottom[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <bool TWO>
FUNC void places_set(Places<TWO>& x, int, float first, float second) {
  const float of[2] = {first, second};
  HLA_UNROLL
  for (int e = 0; e < 2; e++) {
    x.first[e] = tf32(of[e]);
    if (TWO) x.rest[e] = __float_as_uint(of[e] - __uint_as_float(x.first[e]));
  }
}

template <typename P>
FUNC constexpr bool in_two() { return sizeof(*P()) == 4; }

template <int PARTS, bool A, bool B>
FUNC void places_mma(int part, float (&top)[2], float (&bottom)[2], const Places<A>& upper, const Places<A>& lower,
                     const Places<B>& right, bool) {
  const bool rest = part + 1 < PARTS, ours = rest && A && part == 0;
  const auto& a = ours ? upper.rest : upper.first;
  const auto& b = ours ? lower.rest : lower.first;
  const auto& c = rest && !ours ? right.rest : right.first;
  mma_tf32(top, bottom, a[0], b[0], a[1], b[1], c[0], c[1]);
}

#endif

// x[n] = a lane's places of row at.row of the 8 rows from 8 n on, of a step's terms from the first at p on; TURNED: of
// the transpose of what lies there. ROWS blocks of rows and BLOCKS of terms are there.
template <int ROWS, int BLOCKS, bool TURNED, bool TWO, typename T>
FUNC void places_read(Places<TWO> (&x)[2], const T* p, int ld, Spot at) {
  HLA_UNROLL
  for (int n = 0; n < ROWS; n++) {
    HLA_UNROLL
    for (int m = 0; m < BLOCKS; m++) {
      if (TURNED) {
        const T* q = p + (8 * m + at.col) * ld + 8 * n + at.row;
        places_set(x[n], m, static_cast<float>(q[0]), static_cast<float>(q[ld]));
      } else {
        const auto both = run_read<2>(p + (8 * n + at.row) * ld + 8 * m + at.col);
        places_set(x[n], m, static_cast<float>(both[0]), static_cast<float>(both[1]));
      }
    }
  }
}

#ifdef HLA_ROUNDED

// In bfloat16 a block comes as it lies, and four at once.
template <int ROWS, int BLOCKS, bool TURNED, bool TWO>
FUNC void places_read(Places<TWO> (&x)[2], const __nv_bfloat16* p, int ld, Spot at) {
  const int lane = 4 * at.row + at.col / 2, row = lane % 8;
  if (ROWS * BLOCKS == 4) {
    const int n = lane / 16, m = lane / 8 % 2;
    unsigned of[4];
    if (TURNED) {
      read_blocks_turned(of, p + (8 * m + row) * ld + 8 * n);
    } else {
      read_blocks(of, p + (8 * n + row) * ld + 8 * m);
    }
    HLA_UNROLL
    for (int i = 0; i < 4; i++) x[i / 2].first[i % 2] = of[i];
  } else {
    HLA_UNROLL
    for (int i = 0; i < ROWS * BLOCKS; i++) {
      const int n = i / BLOCKS, m = i % BLOCKS;
      x[n].first[m] = TURNED ? read_turned(p + (8 * m + row) * ld + 8 * n) : read_block(p + (8 * n + row) * ld + 8 * m);
    }
  }
}

#endif

template <int ROWS, bool TURNED, bool TWO, typename P>
FUNC void places_read(Places<TWO> (&x)[2], P p, int ld, bool half, Spot at) {
  if (half) {
    places_read<ROWS, 1, TURNED>(x, p, ld, at);
  } else {
    places_read<ROWS, STEP, TURNED>(x, p, ld, at);
  }
}

// What a lane has of columns of the tile b, of the step's terms that are its rows from block k on.
template <bool TWO, int K, int C>
FUNC void places_of(Places<TWO> (&x)[2], const Tile<K, C>& b, int k) {
  HLA_UNROLL
  for (int c = 0; c < 2; c++) {
    HLA_UNROLL
    for (int m = 0; m < STEP; m++) {
      if (c >= C || k + m >= K) {
        x[c].first[m] = x[c].rest[m] = 0;
      } else {
        places_set(x[c], m, b.of[k + m][c][0], b.of[k + m][c][1]);
      }
    }
    if (STEP == 1 && c >= C) x[c].first[1] = x[c].rest[1] = 0;
  }
}

// Blocks r and, where ROWS is 2, r + 1 of the rows of c += those of A, which lie at a, times b.
template <int ROWS, bool TURNED, bool B, int R, int C, typename P>
FUNC void rows_mma(Tile<R, C>& c, int r, P a, int ld, const Places<B> (&b)[2], bool half, Spot at) {
  constexpr bool A = in_two<P>();
  constexpr int PARTS = 1 + A + B;
  Places<A> rows[2];
  fence_loads();
  places_read<ROWS, TURNED>(rows, a, ld, half, at);
  HLA_UNROLL
  for (int part = 0; part < PARTS; part++) {
    HLA_UNROLL
    for (int n = 0; n < ROWS; n++) {
      float none[2] = {0.0f, 0.0f};
      places_mma<PARTS>(part, c.of[r + n][0], C > 1 ? c.of[r + n][C - 1] : none, b[0], b[1], rows[n], half);
    }
  }
}

template <int K, int C, bool SYMMETRIC = false>
using State = Tile<K, C>;

// CAUSAL: what lies there is zero above its diagonal, in blocks of 16 x 16.
template <int R, int K, int C, bool TURNED, bool CAUSAL, bool EXACT = false, typename P>
FUNC void tile_mma(Tile<R, C>& c, P a, int ld, const Tile<K, C>& b, Spot at) {
  constexpr bool B = (TURNED && !CAUSAL) || EXACT || !ROUNDED;
  HLA_UNROLL
  for (int k = 0; k < K; k += STEP) {
    Places<B> right[2];
    places_of(right, b, k);
    HLA_UNROLL
    for (int r = 0; r < R; r += 2) {
      if (CAUSAL && (TURNED ? k / 2 < r / 2 : k / 2 > r / 2)) continue;
      const P block = TURNED ? a + 8 * k * ld + 8 * r : a + 8 * r * ld + 8 * k;
      if (r + 1 < R) {
        rows_mma<2, TURNED>(c, r, block, ld, right, k + STEP > K, at);
      } else {
        rows_mma<1, TURNED>(c, r, block, ld, right, k + STEP > K, at);
      }
    }
  }
}

// Some blocks below the diagonal are made all the same.
template <int R, int K, int C, typename P>
FUNC void tile_mma_upper(Tile<R, C>& c, P a, int ld, const Tile<K, C>& b, int col, Spot at) {
  Places<true> right[(K + STEP - 1) / STEP][2];
  HLA_UNROLL
  for (int k = 0; k < K; k += STEP) places_of(right[k / STEP], b, k);
  HLA_UNROLL
  for (int r = 0; r < R; r += 2) {
    if (r < col + C) {
      HLA_UNROLL
      for (int k = 0; k < K; k += STEP) {
        const P block = a + 8 * k * ld + 8 * r;
        if (r + 1 < R) {
          rows_mma<2, true>(c, r, block, ld, right[k / STEP], k + STEP > K, at);
        } else {
          rows_mma<1, true>(c, r, block, ld, right[k / STEP], k + STEP > K, at);
        }
      }
    }
  }
}

// c (two blocks of rows, N of columns) += x y^T for 8 ROWS rows of x and 8 N rows of y, both 8K wide in shared memory.
template <int K, int ROWS, int N, typename PX, typename PY>
FUNC void block_mma(float (&c)[N][2][2], PX x, int ldx, PY y, int ldy, Spot at) {
  constexpr bool A = in_two<PX>(), B = in_two<PY>();
  constexpr int PARTS = 1 + A + B;
  HLA_UNROLL
  for (int k = 0; k < K; k += STEP) {
    const bool half = k + STEP > K;
    fence_loads();
    Places<A> left[2];
    Places<B> right[2];
    if (ROWS == 1) {
      HLA_UNROLL
      for (int e = 0; e < 2; e++) left[1].first[e] = left[1].rest[e] = 0;
    }
    places_read<ROWS, false>(left, x + 8 * k, ldx, half, at);
    places_read<N, false>(right, y + 8 * k, ldy, half, at);
    HLA_UNROLL
    for (int part = 0; part < PARTS; part++) {
      HLA_UNROLL
      for (int n = 0; n < N; n++) places_mma<PARTS>(part, c[n][0], c[n][1], left[0], left[1], right[n], half);
    }
  }
}
