// One token of every operator, one launch: each byte of the state is read once and written once.
//
// Everything is the step of LA_{g^p} for the G query heads x_0.. that share one state:
//
//     S' = g^p S + y z^T          out_h = scale S'^T x_h
//
//     linear_step   o = LA(P; k, v, q)
//     hla2_step     k~ = LA_g(S; k, k, q) + scale ridge q     o = LA_{g^2}(F; k~, v, q)
//     ahla_step     r = LA_g(P; k, v, q)                      o = LA_g(E; k, r, q)
//     hla3_step     k~ = LA_g(S; k, k, q)   r = LA_g(P; k, v, q)   o = LA_{g^3}(F; k~, r, q)
//
// q [B, Hq, D], k [B, Hkv, D], v [B, Hkv, DV], g [B, Hkv] float32, states float32 [B, heads, D, D or DV]
// (S and P per key-value head, F and E per query head), any strides; o [B, Hq, DV] in T, states out
// contiguous. floats: scale, ridge, eps. A threadgroup owns one key-value head and its G = Hq / Hkv query heads
// (grid 1 x 1 x B Hkv): lanes go along a state's columns, simdgroups take its rows in turn.
//
// With HLA_NORMALISING every state of values has its normaliser beside it, the state of the value 1: a vector
// [B, heads, D] float32, and o = num / (den + eps).
//
// T dtype, D, DV widths, G query heads per key-value head, NS simdgroups. PACKED (hla2_step, hla3_step): S is
// symmetric and s, s_new hold its upper triangle row by row, [B, Hkv, 1, D (D + 1) / 2].
// Threadgroup bytes: at most 4 (2 G D + D + 2 DV + NS M + G DV + 1 + 2 G), M = max(D, DV).
// Mirrors mlx_hla.ops.passes.Token.

// Where a state lies: its element (row, col) at p[base + row * row_step + col * col_step].
struct Place {
  long base;
  int row_step, col_step;
};

template <typename S>
FUNC Place place_of(S strides, int batch, int head) {
  Place at;
  at.base = batch * strides[0] + head * strides[1];
  at.row_step = int(strides[2]);
  at.col_step = int(strides[3]);
  return at;
}

// Columns of a row that a lane has: neighbours, where the rows lie together one load and one store.
template <int WIDTH>
FUNC constexpr int lane_columns() { return WIDTH <= 32 ? 1 : WIDTH <= 64 ? 2 : 4; }

// What a lane adds up for each of G outputs, of C columns: its neighbours, or where SPREAD lane + 32 c.
template <int G, int C>
struct Sums {
  float of[G][C];
};

template <int G, int C>
FUNC void sums_zero(OWN Sums<G, C>& sums) {
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) sums.of[h][c] = 0.0f;
  }
}

// out [G, WIDTH] = scale (the sums over all simdgroups, and what out holds where ADD). part is scratch of
// NS * WIDTH floats. Ends with a barrier.
template <int WIDTH, int NS, bool ADD, bool SPREAD, int G, int C>
FUNC void sums_write(
    OWN Sums<G, C>& sums, float scale, IN_SHARED float* part, IN_SHARED float* out, Launch launch) {
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int col = SPREAD ? launch.lane + 32 * c : C * launch.lane + c;
      if (col < WIDTH) part[launch.simdgroup * WIDTH + col] = sums.of[h][c];
    }
    sync_threadgroup();
    for (int col = 32 * launch.simdgroup + launch.lane; col < WIDTH; col += 32 * NS) {
      float total = ADD ? out[h * WIDTH + col] : 0.0f;
      for (int s = 0; s < NS; s++) total += part[s * WIDTH + col];
      out[h * WIDTH + col] = scale * total;
    }
    sync_threadgroup();
  }
}

// One step of LA for G queries x [G, DY]; out [G, DZ], y and z in threadgroup memory; part is scratch of
// NS * DZ floats. Ends with a barrier.
template <int DY, int DZ, int G, int NS, typename P, typename Q>
FUNC void step_la(
    P old_state, Place from, Q new_state, long to, float decay, IN_SHARED const float* y,
    IN_SHARED const float* z, IN_SHARED const float* x, float scale, IN_SHARED float* part,
    IN_SHARED float* out, Launch launch) {
  constexpr int C = lane_columns<DZ>();
  constexpr bool WHOLE = DZ % C == 0;
  const int col = C * launch.lane, count = DZ - col;
  const bool runs = in_runs<C>(old_state + from.base, from.row_step, from.col_step, DZ);
  const Floats<C> own = floats_read<C>(z + col, 1, count, WHOLE);
  Sums<G, C> sums;
  sums_zero(sums);
  for (int row = launch.simdgroup; row < DY; row += NS) {
    const long place = from.base + row * from.row_step + col * from.col_step;
    Floats<C> s = floats_read<C>(old_state + place, from.col_step, count, runs);
    const float key = y[row];
    HLA_UNROLL
    for (int c = 0; c < C; c++) s.of[c] = decay * s.of[c] + key * own.of[c];
    floats_write<float>(new_state + to + row * DZ + col, 1, count, WHOLE, s);
    HLA_UNROLL
    for (int h = 0; h < G; h++) {
      const float query = x[h * DY + row];
      HLA_UNROLL
      for (int c = 0; c < C; c++) sums.of[h][c] += s.of[c] * query;
    }
  }
  sums_write<DZ, NS, false, false>(sums, scale, part, out, launch);
}

// The same for y = z and a symmetric state of which only the upper triangle lies in memory: element (row, col)
// at from.base + (row D - row (row - 1) / 2 + col - row) from.col_step. What it adds to row `col` of the result
// goes over the columns' sums as above, what its mirror image adds to row `row` over a sum along the row.
template <int D, int G, int NS, typename P, typename Q>
FUNC void step_la_packed(
    P old_state, Place from, Q new_state, long to, float decay, IN_SHARED const float* y,
    IN_SHARED const float* x, float scale, IN_SHARED float* part, IN_SHARED float* out, Launch launch) {
  constexpr int C = (D + 31) / 32;
  Sums<G, C> sums;
  sums_zero(sums);
  for (int row = launch.simdgroup; row < D; row += NS) {
    const int start = row * D - row * (row + 1) / 2;  // where column 0 of this row would lie
    float mirrored[G];
    HLA_UNROLL
    for (int h = 0; h < G; h++) mirrored[h] = 0.0f;
    HLA_UNROLL
    for (int c = 0; c < C; c++) {
      int col = launch.lane + 32 * c;
      if (row <= col && col < D) {
        float s = decay * old_state[from.base + (start + col) * from.col_step] + y[row] * y[col];
        new_state[to + start + col] = s;
        HLA_UNROLL
        for (int h = 0; h < G; h++) {
          sums.of[h][c] += s * x[h * D + row];
          if (row < col) mirrored[h] += s * x[h * D + col];
        }
      }
    }
    HLA_UNROLL
    for (int h = 0; h < G; h++) {
      float total = lanes_sum(mirrored[h]);
      if (launch.lane == 0) out[h * D + row] = total;
    }
  }
  sums_write<D, NS, true, true>(sums, scale, part, out, launch);
}

// The step of the symmetric state S = LA(k, k) for the group's queries, packed or whole.
template <bool PACKED, int D, int G, int NS, typename P, typename Q>
FUNC void step_symmetric(
    P old_state, Place from, Q new_state, int bh, float decay, IN_SHARED const float* k,
    IN_SHARED const float* q, float scale, IN_SHARED float* part, IN_SHARED float* out, Launch launch) {
  if (PACKED) {
    step_la_packed<D, G, NS>(old_state, from, new_state, long(bh) * (D * (D + 1) / 2), decay, k, q, scale, part, out,
                             launch);
  } else {
    step_la<D, D, G, NS>(old_state, from, new_state, long(bh) * (D * D), decay, k, k, q, scale, part, out, launch);
  }
}

// dst = n heads of `width` elements, the first at src, in float; needs a barrier before it is read.
template <int NS, typename P>
FUNC void step_read(IN_SHARED float* dst, P src, int head_step, int col_step, int heads, int width, Launch launch) {
  for (int i = launch.index; i < heads * width; i += 32 * NS) {
    dst[i] = static_cast<float>(src[i / width * head_step + i % width * col_step]);
  }
}

// The step of a normaliser, the state of the value z = 1 (or of the denominator that stands in its place):
//
//     n' = decay n + z y          den_h = scale n'^T x_h
//
// By one simdgroup; den is to be read after the next barrier.
template <int D, int G, typename P, typename Q>
FUNC void step_normaliser(
    P old_state, long from, int step, Q new_state, long to, float decay, IN_SHARED const float* y, float z,
    IN_SHARED const float* x, float scale, IN_SHARED float* den, int lane) {
  float sum[G];
  HLA_UNROLL
  for (int h = 0; h < G; h++) sum[h] = 0.0f;
  for (int row = lane; row < D; row += 32) {
    float n = decay * old_state[from + row * step] + z * y[row];
    new_state[to + row] = n;
    HLA_UNROLL
    for (int h = 0; h < G; h++) sum[h] += n * x[h * D + row];
  }
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    float total = lanes_sum(sum[h]);
    if (lane == 0) den[h] = scale * total;
  }
}

// dst = n heads of `width` elements, normalising over their denominators.
template <typename T, int NS, typename P, typename F>
FUNC void step_write(
    P dst, IN_SHARED const float* src, IN_SHARED const float* den, F floats, int heads, int width, Launch launch) {
  for (int i = launch.index; i < heads * width; i += 32 * NS) {
#ifdef HLA_NORMALISING
    dst[i] = static_cast<T>(src[i] / (den[i / width] + floats[2]));
#else
    dst[i] = static_cast<T>(src[i]);
#endif
  }
}

//# before each body
  SHARED float qs[G * D], ks[D], vs[DV], gs[1], den[G];
  const int hkv = k_shape[1], bh = launch.group.z, batch = bh / hkv, kv = bh % hkv;
  const float scale = floats[0];
  step_read<NS>(qs, q + batch * q_strides[0] + kv * G * q_strides[1], int(q_strides[1]), int(q_strides[2]), G, D,
                launch);
  step_read<NS>(ks, k + batch * k_strides[0] + kv * k_strides[1], 0, int(k_strides[2]), 1, D, launch);
  step_read<NS>(vs, v + batch * v_strides[0] + kv * v_strides[1], 0, int(v_strides[2]), 1, DV, launch);
  step_read<NS>(gs, g + batch * g_strides[0] + kv * g_strides[1], 0, 0, 1, 1, launch);
  sync_threadgroup();
  const float decay = gs[0];
//# end

//# kernel linear_step
//# inputs: q k v g p floats
//# outputs: o p_new
//# normalising: m
//# body
  SHARED float part[NS * DV], out[G * DV];
#ifdef HLA_NORMALISING
  if (launch.simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D, decay,
                          ks, 1.0f, qs, scale, den, launch.lane);
  }
#endif
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        out, launch);
  step_write<T, NS>(o + long(bh) * G * DV, out, den, floats, G, DV, launch);

//# kernel hla2_step
//# inputs: q k v g s f floats
//# outputs: o s_new f_new
//# normalising: eta
//# body
  constexpr int M = D > DV ? D : DV;
  SHARED float part[NS * M], kts[G * D], out[DV];
  const float ridge = floats[1];
  step_symmetric<PACKED, D, G, NS>(s, place_of(s_strides, batch, kv), s_new, bh, decay, ks, qs, scale, part, kts,
                                   launch);
  for (int i = launch.index; i < G * D; i += 32 * NS) kts[i] += scale * ridge * qs[i];
  sync_threadgroup();
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (launch.simdgroup == 0) {
      step_normaliser<D, 1>(eta, batch * eta_strides[0] + head * eta_strides[1], int(eta_strides[2]), eta_new,
                            slot * D, decay * decay, kts + h * D, 1.0f, qs + h * D, scale, den + h, launch.lane);
    }
#endif
    step_la<D, DV, 1, NS>(f, place_of(f_strides, batch, head), f_new, slot * D * DV, decay * decay, kts + h * D, vs,
                          qs + h * D, scale, part, out, launch);
    step_write<T, NS>(o + slot * DV, out, den + h, floats, 1, DV, launch);
  }

//# kernel ahla_step
//# inputs: q k v g p e floats
//# outputs: o p_new e_new
//# normalising: m n
//# body
  SHARED float part[NS * DV], rs[G * DV], out[DV], rdens[G];
#ifdef HLA_NORMALISING
  if (launch.simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D, decay,
                          ks, 1.0f, qs, scale, rdens, launch.lane);
  }
#endif
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        rs, launch);
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (launch.simdgroup == 0) {
      step_normaliser<D, 1>(n, batch * n_strides[0] + head * n_strides[1], int(n_strides[2]), n_new,
                            slot * D, decay, ks, rdens[h], qs + h * D, scale, den + h, launch.lane);
    }
#endif
    step_la<D, DV, 1, NS>(e, place_of(e_strides, batch, head), e_new, slot * D * DV, decay, ks, rs + h * DV,
                          qs + h * D, scale, part, out, launch);
    step_write<T, NS>(o + slot * DV, out, den + h, floats, 1, DV, launch);
  }

//# kernel hla3_step
//# inputs: q k v g s p f floats
//# outputs: o s_new p_new f_new
//# normalising: m eta
//# body
  constexpr int M = D > DV ? D : DV;
  SHARED float part[NS * M], kts[G * D], rs[G * DV], out[DV], rdens[G];
#ifdef HLA_NORMALISING
  if (launch.simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D, decay,
                          ks, 1.0f, qs, scale, rdens, launch.lane);
  }
#endif
  step_symmetric<PACKED, D, G, NS>(s, place_of(s_strides, batch, kv), s_new, bh, decay, ks, qs, scale, part, kts,
                                   launch);
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        rs, launch);
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (launch.simdgroup == 0) {
      step_normaliser<D, 1>(eta, batch * eta_strides[0] + head * eta_strides[1], int(eta_strides[2]), eta_new,
                            slot * D, decay * decay * decay, kts + h * D, rdens[h], qs + h * D, scale, den + h,
                            launch.lane);
    }
#endif
    step_la<D, DV, 1, NS>(f, place_of(f_strides, batch, head), f_new, slot * D * DV, decay * decay * decay,
                          kts + h * D, rs + h * DV, qs + h * D, scale, part, out, launch);
    step_write<T, NS>(o + slot * DV, out, den + h, floats, 1, DV, launch);
  }
