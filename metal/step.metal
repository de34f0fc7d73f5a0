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
// (grid B Hkv): lanes go along a state's columns, simdgroups take its rows in turn.
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
METAL_FUNC Place place_of(S strides, int batch, int head) {
  Place at;
  at.base = batch * strides[0] + head * strides[1];
  at.row_step = int(strides[2]);
  at.col_step = int(strides[3]);
  return at;
}

// One step of LA for G queries x [G, DY]; out [G, DZ], y and z in threadgroup memory; part is scratch of
// NS * DZ floats. Ends with a barrier.
template <int DY, int DZ, int G, int NS, typename P, typename Q>
METAL_FUNC void step_la(
    P old_state, Place from, Q new_state, long to, float decay, threadgroup const float* y,
    threadgroup const float* z, threadgroup const float* x, float scale, threadgroup float* part,
    threadgroup float* out, int simdgroup, int lane) {
  constexpr int CPL = (DZ + 31) / 32;
  float sum[G][CPL];
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) sum[h][c] = 0.0f;
  }
  for (int row = simdgroup; row < DY; row += NS) {
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) {
      int col = lane + 32 * c;
      if (col < DZ) {
        float s = decay * old_state[from.base + row * from.row_step + col * from.col_step] + y[row] * z[col];
        new_state[to + row * DZ + col] = s;
        HLA_UNROLL
        for (int h = 0; h < G; h++) sum[h][c] += s * x[h * DY + row];
      }
    }
  }
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) {
      int col = lane + 32 * c;
      if (col < DZ) part[simdgroup * DZ + col] = sum[h][c];
    }
    sync_threadgroup();
    for (int col = 32 * simdgroup + lane; col < DZ; col += 32 * NS) {
      float total = 0.0f;
      for (int s = 0; s < NS; s++) total += part[s * DZ + col];
      out[h * DZ + col] = scale * total;
    }
    sync_threadgroup();
  }
}

// The same for y = z and a symmetric state of which only the upper triangle lies in memory: element (row, col)
// at from.base + (row D - row (row - 1) / 2 + col - row) from.col_step. What it adds to row `col` of the result
// goes over the columns' sums as above, what its mirror image adds to row `row` over a sum along the row.
template <int D, int G, int NS, typename P, typename Q>
METAL_FUNC void step_la_packed(
    P old_state, Place from, Q new_state, long to, float decay, threadgroup const float* y,
    threadgroup const float* x, float scale, threadgroup float* part, threadgroup float* out, int simdgroup,
    int lane) {
  constexpr int CPL = (D + 31) / 32;
  float sum[G][CPL];
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) sum[h][c] = 0.0f;
  }
  for (int row = simdgroup; row < D; row += NS) {
    const int start = row * D - row * (row + 1) / 2;  // where column 0 of this row would lie
    float mirrored[G];
    HLA_UNROLL
    for (int h = 0; h < G; h++) mirrored[h] = 0.0f;
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) {
      int col = lane + 32 * c;
      if (row <= col && col < D) {
        float s = decay * old_state[from.base + (start + col) * from.col_step] + y[row] * y[col];
        new_state[to + start + col] = s;
        HLA_UNROLL
        for (int h = 0; h < G; h++) {
          sum[h][c] += s * x[h * D + row];
          if (row < col) mirrored[h] += s * x[h * D + col];
        }
      }
    }
    HLA_UNROLL
    for (int h = 0; h < G; h++) {
      float total = lanes_sum(mirrored[h]);
      if (lane == 0) out[h * D + row] = total;
    }
  }
  HLA_UNROLL
  for (int h = 0; h < G; h++) {
    HLA_UNROLL
    for (int c = 0; c < CPL; c++) {
      int col = lane + 32 * c;
      if (col < D) part[simdgroup * D + col] = sum[h][c];
    }
    sync_threadgroup();
    for (int col = 32 * simdgroup + lane; col < D; col += 32 * NS) {
      float total = out[h * D + col];
      for (int s = 0; s < NS; s++) total += part[s * D + col];
      out[h * D + col] = scale * total;
    }
    sync_threadgroup();
  }
}

// The step of the symmetric state S = LA(k, k) for the group's queries, packed or whole.
template <bool PACKED, int D, int G, int NS, typename P, typename Q>
METAL_FUNC void step_symmetric(
    P old_state, Place from, Q new_state, int bh, float decay, threadgroup const float* k,
    threadgroup const float* q, float scale, threadgroup float* part, threadgroup float* out, int simdgroup,
    int lane) {
  if (PACKED) {
    step_la_packed<D, G, NS>(old_state, from, new_state, long(bh) * (D * (D + 1) / 2), decay, k, q, scale, part, out,
                             simdgroup, lane);
  } else {
    step_la<D, D, G, NS>(old_state, from, new_state, long(bh) * (D * D), decay, k, k, q, scale, part, out, simdgroup,
                         lane);
  }
}

// dst = n heads of `width` elements, the first at src, in float; needs a barrier before it is read.
template <typename P>
METAL_FUNC void step_read(
    threadgroup float* dst, P src, int head_step, int col_step, int heads, int width, int thread_index, int threads) {
  for (int i = thread_index; i < heads * width; i += threads) {
    dst[i] = static_cast<float>(src[i / width * head_step + i % width * col_step]);
  }
}

// The step of a normaliser, the state of the value z = 1 (or of the denominator that stands in its place):
//
//     n' = decay n + z y          den_h = scale n'^T x_h
//
// By one simdgroup; den is to be read after the next barrier.
template <int D, int G, typename P, typename Q>
METAL_FUNC void step_normaliser(
    P old_state, long from, int step, Q new_state, long to, float decay, threadgroup const float* y, float z,
    threadgroup const float* x, float scale, threadgroup float* den, int lane) {
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

// dst = src over the denominators, one for each `width` elements.
template <typename T, typename P>
METAL_FUNC void step_write(
    P dst, threadgroup const float* src, threadgroup const float* den, float eps, int width, int count,
    int thread_index, int threads) {
  for (int i = thread_index; i < count; i += threads) dst[i] = static_cast<T>(src[i] / (den[i / width] + eps));
}

template <typename T, typename P>
METAL_FUNC void step_write(P dst, threadgroup const float* src, int count, int thread_index, int threads) {
  for (int i = thread_index; i < count; i += threads) dst[i] = static_cast<T>(src[i]);
}

//# kernel linear_step
//# inputs: q k v g p floats
//# outputs: o p_new
//# normalising: m
//# body
  threadgroup float qs[G * D], ks[D], vs[DV], gs[1], part[NS * DV], out[G * DV], den[G];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int thread_index = thread_index_in_threadgroup, hkv = k_shape[1];
  const int bh = threadgroup_position_in_grid.x, batch = bh / hkv, kv = bh % hkv;
  const float scale = floats[0];
  step_read(qs, q + batch * q_strides[0] + kv * G * q_strides[1], int(q_strides[1]), int(q_strides[2]), G, D,
            thread_index, 32 * NS);
  step_read(ks, k + batch * k_strides[0] + kv * k_strides[1], 0, int(k_strides[2]), 1, D, thread_index, 32 * NS);
  step_read(vs, v + batch * v_strides[0] + kv * v_strides[1], 0, int(v_strides[2]), 1, DV, thread_index, 32 * NS);
  step_read(gs, g + batch * g_strides[0] + kv * g_strides[1], 0, 0, 1, 1, thread_index, 32 * NS);
  sync_threadgroup();
  const float decay = gs[0];
#ifdef HLA_NORMALISING
  if (simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D,
                          decay, ks, 1.0f, qs, scale, den, lane);
  }
#endif
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        out, simdgroup, lane);
#ifdef HLA_NORMALISING
  step_write<T>(o + long(bh) * G * DV, out, den, floats[2], DV, G * DV, thread_index, 32 * NS);
#else
  step_write<T>(o + long(bh) * G * DV, out, G * DV, thread_index, 32 * NS);
#endif

//# kernel hla2_step
//# inputs: q k v g s f floats
//# outputs: o s_new f_new
//# normalising: eta
//# body
  constexpr int M = D > DV ? D : DV;
  threadgroup float qs[G * D], ks[D], vs[DV], gs[1], part[NS * M], kts[G * D], out[DV], den[G];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int thread_index = thread_index_in_threadgroup, hkv = k_shape[1];
  const int bh = threadgroup_position_in_grid.x, batch = bh / hkv, kv = bh % hkv;
  const float scale = floats[0], ridge = floats[1];
  step_read(qs, q + batch * q_strides[0] + kv * G * q_strides[1], int(q_strides[1]), int(q_strides[2]), G, D,
            thread_index, 32 * NS);
  step_read(ks, k + batch * k_strides[0] + kv * k_strides[1], 0, int(k_strides[2]), 1, D, thread_index, 32 * NS);
  step_read(vs, v + batch * v_strides[0] + kv * v_strides[1], 0, int(v_strides[2]), 1, DV, thread_index, 32 * NS);
  step_read(gs, g + batch * g_strides[0] + kv * g_strides[1], 0, 0, 1, 1, thread_index, 32 * NS);
  sync_threadgroup();
  const float decay = gs[0];
  step_symmetric<PACKED, D, G, NS>(s, place_of(s_strides, batch, kv), s_new, bh, decay, ks, qs, scale, part, kts,
                                   simdgroup, lane);
  for (int i = thread_index; i < G * D; i += 32 * NS) kts[i] += scale * ridge * qs[i];
  sync_threadgroup();
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (simdgroup == 0) {
      step_normaliser<D, 1>(eta, batch * eta_strides[0] + head * eta_strides[1], int(eta_strides[2]), eta_new,
                            slot * D, decay * decay, kts + h * D, 1.0f, qs + h * D, scale, den + h, lane);
    }
#endif
    step_la<D, DV, 1, NS>(f, place_of(f_strides, batch, head), f_new, slot * D * DV, decay * decay, kts + h * D, vs,
                          qs + h * D, scale, part, out, simdgroup, lane);
#ifdef HLA_NORMALISING
    step_write<T>(o + slot * DV, out, den + h, floats[2], DV, DV, thread_index, 32 * NS);
#else
    step_write<T>(o + slot * DV, out, DV, thread_index, 32 * NS);
#endif
  }

//# kernel ahla_step
//# inputs: q k v g p e floats
//# outputs: o p_new e_new
//# normalising: m n
//# body
  threadgroup float qs[G * D], ks[D], vs[DV], gs[1], part[NS * DV], rs[G * DV], out[DV], rdens[G], den[G];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int thread_index = thread_index_in_threadgroup, hkv = k_shape[1];
  const int bh = threadgroup_position_in_grid.x, batch = bh / hkv, kv = bh % hkv;
  const float scale = floats[0];
  step_read(qs, q + batch * q_strides[0] + kv * G * q_strides[1], int(q_strides[1]), int(q_strides[2]), G, D,
            thread_index, 32 * NS);
  step_read(ks, k + batch * k_strides[0] + kv * k_strides[1], 0, int(k_strides[2]), 1, D, thread_index, 32 * NS);
  step_read(vs, v + batch * v_strides[0] + kv * v_strides[1], 0, int(v_strides[2]), 1, DV, thread_index, 32 * NS);
  step_read(gs, g + batch * g_strides[0] + kv * g_strides[1], 0, 0, 1, 1, thread_index, 32 * NS);
  sync_threadgroup();
  const float decay = gs[0];
#ifdef HLA_NORMALISING
  if (simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D,
                          decay, ks, 1.0f, qs, scale, rdens, lane);
  }
#endif
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        rs, simdgroup, lane);
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (simdgroup == 0) {
      step_normaliser<D, 1>(n, batch * n_strides[0] + head * n_strides[1], int(n_strides[2]), n_new,
                            slot * D, decay, ks, rdens[h], qs + h * D, scale, den + h, lane);
    }
#endif
    step_la<D, DV, 1, NS>(e, place_of(e_strides, batch, head), e_new, slot * D * DV, decay, ks, rs + h * DV,
                          qs + h * D, scale, part, out, simdgroup, lane);
#ifdef HLA_NORMALISING
    step_write<T>(o + slot * DV, out, den + h, floats[2], DV, DV, thread_index, 32 * NS);
#else
    step_write<T>(o + slot * DV, out, DV, thread_index, 32 * NS);
#endif
  }

//# kernel hla3_step
//# inputs: q k v g s p f floats
//# outputs: o s_new p_new f_new
//# normalising: m eta
//# body
  constexpr int M = D > DV ? D : DV;
  threadgroup float qs[G * D], ks[D], vs[DV], gs[1], part[NS * M], kts[G * D], rs[G * DV], out[DV], rdens[G], den[G];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int thread_index = thread_index_in_threadgroup, hkv = k_shape[1];
  const int bh = threadgroup_position_in_grid.x, batch = bh / hkv, kv = bh % hkv;
  const float scale = floats[0];
  step_read(qs, q + batch * q_strides[0] + kv * G * q_strides[1], int(q_strides[1]), int(q_strides[2]), G, D,
            thread_index, 32 * NS);
  step_read(ks, k + batch * k_strides[0] + kv * k_strides[1], 0, int(k_strides[2]), 1, D, thread_index, 32 * NS);
  step_read(vs, v + batch * v_strides[0] + kv * v_strides[1], 0, int(v_strides[2]), 1, DV, thread_index, 32 * NS);
  step_read(gs, g + batch * g_strides[0] + kv * g_strides[1], 0, 0, 1, 1, thread_index, 32 * NS);
  sync_threadgroup();
  const float decay = gs[0];
#ifdef HLA_NORMALISING
  if (simdgroup == 0) {
    step_normaliser<D, G>(m, batch * m_strides[0] + kv * m_strides[1], int(m_strides[2]), m_new, long(bh) * D,
                          decay, ks, 1.0f, qs, scale, rdens, lane);
  }
#endif
  step_symmetric<PACKED, D, G, NS>(s, place_of(s_strides, batch, kv), s_new, bh, decay, ks, qs, scale, part, kts,
                                   simdgroup, lane);
  step_la<D, DV, G, NS>(p, place_of(p_strides, batch, kv), p_new, long(bh) * D * DV, decay, ks, vs, qs, scale, part,
                        rs, simdgroup, lane);
  for (int h = 0; h < G; h++) {
    const int head = kv * G + h;
    const long slot = long(bh) * G + h;
#ifdef HLA_NORMALISING
    if (simdgroup == 0) {
      step_normaliser<D, 1>(eta, batch * eta_strides[0] + head * eta_strides[1], int(eta_strides[2]), eta_new,
                            slot * D, decay * decay * decay, kts + h * D, rdens[h], qs + h * D, scale, den + h, lane);
    }
#endif
    step_la<D, DV, 1, NS>(f, place_of(f_strides, batch, head), f_new, slot * D * DV, decay * decay * decay,
                          kts + h * D, rs + h * DV, qs + h * D, scale, part, out, simdgroup, lane);
#ifdef HLA_NORMALISING
    step_write<T>(o + slot * DV, out, den + h, floats[2], DV, DV, thread_index, 32 * NS);
#else
    step_write<T>(o + slot * DV, out, DV, thread_index, 32 * NS);
#endif
  }
