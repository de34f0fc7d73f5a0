// The products of products.metal on an NVIDIA GPU's tensor cores.
//
// An instruction multiplies 16 x 8 by 8 x 8 numbers and adds in float32. They are TF32, which is float32 with a
// mantissa of 11 bits: half types are exact in it, and a float32 operand goes in as two numbers, its first 11 bits and
// the rest, so that a product has two or three instructions and float32's accuracy. HLA_ROUNDED, set where a call's q,
// k and v are bfloat16: they are bfloat16, a float32 operand rounded to its 8 bits, or two where it is added to a
// state.

// ---- Products ------------------------------------------------------------------------------------
//
// In an instruction, lane 4 g + t has of the left operand rows g and g + 8, of the right one column g, and of both
// two places of the sum. Two fragments, one below the other, make the 16 rows.
//
//     Places<EXACT>              what a lane has of one row of an operand, or of one column; EXACT: in two parts
//     in_two<P>()                whether numbers of the type that P points to are cut in two
//     by_pairs<P>(turned)        which terms of the sum these places are, if the left operand lies at a P
//     places_read, places_of     from shared memory, and from a fragment
//     places_mma                 the instructions

#ifdef HLA_ROUNDED

CONSTANT bool ROUNDED = true;

// Two numbers in bfloat16, rounded to nearest; the first in the lower half.
FUNC unsigned packed(float first, float second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// The transpose of 8 x 8 numbers of 16 bits, of which each lane has two neighbours as in a fragment.
FUNC unsigned turned(unsigned mine) {
  unsigned other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(mine));
  return other;
}

// The same from shared memory, where lane i < 8 names the row i, of 16 bytes.
FUNC unsigned read_turned(const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  unsigned mine;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(mine) : "r"(at) : "memory");
  return mine;
}

FUNC void mma_bf16(Frag& top, Frag& bottom, unsigned a0, unsigned a1, unsigned b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(top.of[0]), "+f"(top.of[1]), "+f"(bottom.of[0]), "+f"(bottom.of[1])
      : "r"(a0), "r"(a1), "r"(b0));
}

template <bool EXACT>
struct Places {
  unsigned first, rest;
};

template <bool EXACT>
FUNC Places<EXACT> places(float first, float second) {
  Places<EXACT> x;
  x.first = packed(first, second);
  if (EXACT) x.rest = packed(first - __uint_as_float(x.first << 16), second - __uint_as_float(x.first & 0xffff0000u));
  return x;
}

template <typename P>
FUNC constexpr bool in_two() { return false; }

template <typename P>
FUNC constexpr bool by_pairs(bool) { return true; }

template <bool A, bool B>
FUNC void places_mma(Frag& top, Frag& bottom, const Places<A>& upper, const Places<A>& lower, const Places<B>& right) {
  if (B) mma_bf16(top, bottom, upper.first, lower.first, right.rest);
  mma_bf16(top, bottom, upper.first, lower.first, right.first);
}

// A lane's places of row at.row of the 8 x 8 block at p; TURNED: of the block's transpose.
template <bool EXACT, bool PAIRS, bool TURNED, typename T>
FUNC Places<EXACT> places_read(const T* p, int ld, Spot at) {
  if (TURNED) {
    p += at.col * ld + at.row;
    return places<EXACT>(static_cast<float>(p[0]), static_cast<float>(p[ld]));
  }
  const auto both = run_read<2>(p + at.row * ld + at.col);
  return places<EXACT>(static_cast<float>(both[0]), static_cast<float>(both[1]));
}

template <bool EXACT, bool PAIRS, bool TURNED>
FUNC Places<EXACT> places_read(const __nv_bfloat16* p, int ld, Spot at) {
  Places<EXACT> x;
  if (TURNED) {
    x.first = read_turned(p + (4 * at.row + at.col / 2) % 8 * ld);
  } else {
    x.first = *reinterpret_cast<const unsigned*>(p + at.row * ld + at.col);
  }
  return x;
}

// A lane's places of column at.row of a fragment.
template <bool EXACT, bool PAIRS>
FUNC Places<EXACT> places_of(const Frag& f, Spot at) {
  Places<EXACT> x = places<EXACT>(f.of[0], f.of[1]);
  x.first = turned(x.first);
  if (EXACT) x.rest = turned(x.rest);
  return x;
}

#else

CONSTANT bool ROUNDED = false;

// x rounded to 11 bits, to nearest; ties away from zero.
FUNC unsigned tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

FUNC void mma_tf32(Frag& top, Frag& bottom, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                   unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top.of[0]), "+f"(top.of[1]), "+f"(bottom.of[0]), "+f"(bottom.of[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <bool EXACT>
struct Places {
  unsigned first[2], rest[2];
};

template <bool EXACT>
FUNC Places<EXACT> places(float first, float second) {
  Places<EXACT> x;
  x.first[0] = tf32(first);
  x.first[1] = tf32(second);
  if (EXACT) x.rest[0] = __float_as_uint(first - __uint_as_float(x.first[0]));
  if (EXACT) x.rest[1] = __float_as_uint(second - __uint_as_float(x.first[1]));
  return x;
}

template <typename P>
FUNC constexpr bool in_two() { return sizeof(*P()) == 4; }

// The terms 2 t and 2 t + 1, or t and t + 4: so that a warp's lanes read from different banks.
template <typename P>
FUNC constexpr bool by_pairs(bool turned) { return turned || sizeof(*P()) == 2; }

template <bool A, bool B>
FUNC void places_mma(Frag& top, Frag& bottom, const Places<A>& upper, const Places<A>& lower, const Places<B>& right) {
  if (A) {
    mma_tf32(top, bottom, upper.rest[0], lower.rest[0], upper.rest[1], lower.rest[1], right.first[0], right.first[1]);
  }
  if (B) {
    mma_tf32(top, bottom, upper.first[0], lower.first[0], upper.first[1], lower.first[1], right.rest[0],
             right.rest[1]);
  }
  mma_tf32(top, bottom, upper.first[0], lower.first[0], upper.first[1], lower.first[1], right.first[0],
           right.first[1]);
}

// A lane's places of row at.row of the 8 x 8 block at p; TURNED: of the block's transpose, by pairs.
template <bool EXACT, bool PAIRS, bool TURNED, typename P>
FUNC Places<EXACT> places_read(P p, int ld, Spot at) {
  static_assert(PAIRS || !TURNED, "the transpose is read by pairs");
  if (TURNED) {
    p += at.col * ld + at.row;
    return places<EXACT>(static_cast<float>(p[0]), static_cast<float>(p[ld]));
  }
  if (PAIRS) {
    const auto both = run_read<2>(p + at.row * ld + at.col);
    return places<EXACT>(static_cast<float>(both[0]), static_cast<float>(both[1]));
  }
  p += at.row * ld + at.col / 2;
  return places<EXACT>(static_cast<float>(p[0]), static_cast<float>(p[4]));
}

// A lane's places of column at.row of a fragment. Row r lies in the four lanes from 4 r on.
template <bool EXACT, bool PAIRS>
FUNC Places<EXACT> places_of(const Frag& f, Spot at) {
  const int from = (PAIRS ? 4 : 2) * at.col + at.row / 2;
  float of[2];
  HLA_UNROLL
  for (int e = 0; e < 2; e++) {
    const int lane = from + (PAIRS ? 4 : 16) * e;
    const float left = lane_value(f.of[0], lane), right = lane_value(f.of[1], lane);
    of[e] = at.row % 2 == 0 ? left : right;
  }
  return places<EXACT>(of[0], of[1]);
}

#endif

template <bool EXACT>
FUNC Places<EXACT> no_places() { return {}; }

// A lane's places of a row of fragments.
template <bool EXACT, bool PAIRS, int C>
FUNC void row_places(Places<EXACT> (&right)[C], const Frag (&row)[C], Spot at) {
  HLA_UNROLL
  for (int j = 0; j < C; j++) right[j] = places_of<EXACT, PAIRS>(row[j], at);
}

// Rows r and r + 1 of c, of which there may be no second, += the 16 rows of the left operand times those.
template <bool A, bool B, int R, int C>
FUNC void rows_mma(Tile<R, C>& c, int r, const Places<A>& upper, const Places<A>& lower, const Places<B> (&right)[C]) {
  HLA_UNROLL
  for (int j = 0; j < C; j++) {
    Frag none = frag_zero();
    places_mma(c.f[r][j], r + 1 < R ? c.f[(r + 1) % R][j] : none, upper, lower, right[j]);
  }
}

template <int K, int C, bool SYMMETRIC = false>
using State = Tile<K, C>;

template <int R, int K, int C, bool TURNED, bool CAUSAL, bool EXACT = false, typename P>
FUNC void tile_mma(Tile<R, C>& c, P a, int ld, const Tile<K, C>& b, Spot at) {
  constexpr bool STATE = TURNED && !CAUSAL, PAIRS = by_pairs<P>(TURNED);
  constexpr bool A = in_two<P>(), B = STATE || EXACT || !ROUNDED;
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    Places<B> right[C];
    row_places<B, PAIRS>(right, b.f[k], at);
    HLA_UNROLL
    for (int r = 0; r < R; r += 2) {
      const bool top = !CAUSAL || (TURNED ? k >= r : k <= r);
      const bool bottom = r + 1 < R && (!CAUSAL || (TURNED ? k >= r + 1 : k <= r + 1));
      Places<A> upper = no_places<A>(), lower = no_places<A>();
      if (top) upper = places_read<A, PAIRS, TURNED>(TURNED ? a + 8 * k * ld + 8 * r : a + 8 * r * ld + 8 * k, ld, at);
      if (bottom) {
        const int below = r + 1;
        lower = places_read<A, PAIRS, TURNED>(
            TURNED ? a + 8 * k * ld + 8 * below : a + 8 * below * ld + 8 * k, ld, at);
      }
      if (top || bottom) rows_mma(c, r, upper, lower, right);
    }
  }
}

// Some blocks below the diagonal are made all the same.
template <int R, int K, int C, typename P>
FUNC void tile_mma_upper(Tile<R, C>& c, P a, int ld, const Tile<K, C>& b, int col, Spot at) {
  constexpr bool A = in_two<P>(), B = true, PAIRS = by_pairs<P>(true);
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    Places<B> right[C];
    row_places<B, PAIRS>(right, b.f[k], at);
    HLA_UNROLL
    for (int r = 0; r < R; r += 2) {
      if (r < col + C) {
        const auto upper = places_read<A, PAIRS, true>(a + 8 * k * ld + 8 * r, ld, at);
        auto lower = no_places<A>();
        if (r + 1 < R) lower = places_read<A, PAIRS, true>(a + 8 * k * ld + 8 * (r + 1), ld, at);
        rows_mma(c, r, upper, lower, right);
      }
    }
  }
}

template <int K, typename PX, typename PY>
FUNC void block_mma(Frag& c, PX x, int ldx, PY y, int ldy, Spot at) {
  constexpr bool A = in_two<PX>(), B = in_two<PY>(), PAIRS = by_pairs<PX>(false) || by_pairs<PY>(false);
  Frag odd = frag_zero(), none = frag_zero();
  HLA_UNROLL
  for (int k = 0; k < K; k++) {
    const auto left = places_read<A, PAIRS, false>(x + 8 * k, ldx, at);
    const auto right = places_read<B, PAIRS, false>(y + 8 * k, ldy, at);
    places_mma(k % 2 ? odd : c, none, left, no_places<A>(), right);
  }
  frag_set(c, c.of[0] + odd.of[0], c.of[1] + odd.of[1]);
}
