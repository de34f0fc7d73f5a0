// Asymmetric second order and third order: chains of passes LA_g in one walk.
//
//     P_t = g_t P_{t-1} + k_t v_t^T        r_t = scale P_t^T q_t
//     AHLA   F_t = g_t F_{t-1} + k_t r_t^T                                   o_t = scale F_t^T q_t
//     HLA3   S_t = g_t S_{t-1} + k_t k_t^T          k~_t = scale S_t q_t
//            F_t = g_t^3 F_{t-1} + k~_t r_t^T                                o_t = scale F_t^T q_t
//
// q, k, v, g and heads as in hla2.metal; S and P belong to a key-value head, F (E in the paper for AHLA) to a query
// head. A tile of q, k, v is read once, Q K^T formed once for all passes of one power. r never leaves the registers:
// the columns of it that a simdgroup makes are those of the right operand that it needs next. A chunk:
//
//     P1 = scale D (Q K^T)      R = P1 V + scale b Q P        P = b_W P + K^T (b_W / b) V
//     AHLA                      O = P1 R + scale b Q F        F = b_W F + K^T (b_W / b) R
//     HLA3   K~ and S as in hla2.metal, with P1;  P3 = scale D^3 (Q K~^T)
//                               O = P3 R + scale b^3 Q F      F = b_W^3 F + K~^T (b_W / b)^3 R
//
//     routed_walk     everything, one threadgroup per head from the first token to the last (grid 1 x B Hq)
//     routed_middle   r, K~, and what each block adds to F                                 (grid NB x B Hq)
//
// A long sequence of few heads: linear_sums and linear_scan give P and S at the blocks' borders, then routed_middle,
// then linear_scan gives F there and linear_out(q, k or K~, r) the outputs.
//
// THIRD: HLA3. Where it is not, S is any array, and what is written of S and K~ one element, zero.
// Threads: 32 per stripe of 8 NC columns of v, or of k where that has more and THIRD. Registers of a thread in tiles:
// two states, or three, 2 K NC each, and two tiles of a chunk, W NC / 4 each. AHLA: 96 at D = 64, NC = 2, W = 32.
// HLA3: 64 at D = 64, NC = 1; 76 at D = 80 (plan.FUSED).
// Mirrors mlx_hla.ops.ahla and hla3.
//# uses: hla2

// The first pass over a chunk that is staged: its scores in ps, and where THIRD K~, in kts and in kt; `right` is for
// pass_write of S. One barrier inside, where THIRD before the end; kts is to be read after the next.
template <bool THIRD, int W, int LD, int LDK, int LDP, int K, int R, int NC, typename T>
FUNC void walk_first(
    OWN State<K, NC>& s, OWN Tile<R, NC>& kt, OWN Tile<R, NC>& right, IN_SHARED T* qs, IN_SHARED T* ks,
    IN_SHARED Score* kts, IN_SHARED Score* ps, IN_SHARED const Decays<W>& cum, float scale, int col0, Launch launch,
    Spot at) {
  if (THIRD) {
    walk_keys<W, LD, LDK, LDP>(s, kt, right, qs, ks, kts, ps, cum, scale, 0.0f, col0, launch, at);
  } else {
    scores<K>(ps, LDP, qs, LD, ks, LD, cum, 1.0f, scale, launch, at);
    sync_threadgroup();
  }
  fence_loads();
}

// R of the chunk and P to its end. v: this simdgroup's columns of V, which are used up.
template <int LD, int LDP, int K, int R, int NC, typename T>
FUNC void walk_values(
    OWN State<K, NC>& p, OWN Tile<R, NC>& r, OWN Tile<R, NC>& v, IN_SHARED T* qs, IN_SHARED T* ks,
    IN_SHARED const Score* ps, IN_SHARED const Decays<8 * R>& cum, float scale, Spot at) {
  pass_read(r, p, qs, LD, cum, 1.0f, scale, at);       // R = scale b Q P
  tile_mma<R, R, NC, false, true>(r, ps, LDP, v, at);  // R += P1 V
  pass_write(p, ks, LD, v, cum, 1.0f, at);             // P = b_W P + K^T (b_W / b) V
}

//# before each body
  constexpr int K = (D + 7) / 8, R = W / 8, LD = 8 * K + 16 / sizeof(T), PAD = 16 / sizeof(Score), KV = (DV + 7) / 8;
  constexpr int LDK = 8 * K + PAD, LDP = W + PAD, LDV = 8 * KV + 16 / sizeof(T), POWER = THIRD ? 3 : 1;
  // MORE: what K~ has beyond one of halves.
  constexpr int MORE = THIRD ? W * LDK * (sizeof(Score) - 2) : 0, QK_BYTES = 2 * W * LD * sizeof(T) + MORE;
  constexpr bool AHEAD = QK_BYTES <= AHEAD_BYTES, STAGED = QK_BYTES + W * LDV * sizeof(T) <= AHEAD_BYTES;
  SHARED T q_room[(AHEAD ? 2 : 1) * W * LD], k_room[(AHEAD ? 2 : 1) * W * LD], v_room[STAGED ? 2 * W * LDV : 1];
  SHARED Score kts[THIRD ? W * LDK : 1], ps[W * LDP];
  SHARED Decays<W> cums[2];

  const int total = q_shape[1], hq = q_shape[2], hkv = k_shape[2], bh = launch.group.z;
  const int batch = bh / hq, head = bh % hq, kv = head * hkv / hq, col0 = 8 * NC * launch.simdgroup;
  const bool first_of_group = head % (hq / hkv) == 0;
  const float scale = floats[0];
  const long q_base = batch * q_strides[0] + head * q_strides[2], k_base = batch * k_strides[0] + kv * k_strides[2];
  const long v_base = batch * v_strides[0] + kv * v_strides[2];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / hq) * g_strides[2];

  State<K, NC> s, p, f;
//# end

//# kernel routed_walk
//# inputs: q k v g s_first p_first f_first floats
//# outputs: o s_last p_last f_last
//
// s_first [B, Hkv, D, D], p_first [B, Hkv, D, DV], f_first [B, Hq, D, DV] float32, any strides. floats: scale.
// o [B, T, Hq, DV] in T; s_last, p_last, f_last as those before, contiguous.
// T dtype, D, DV widths, W chunk, NC stripe, THIRD.
// Threadgroup bytes: 2 W (D' + pad) sizeof(T) + 4 W (W + 4) + 16 W, and where THIRD 4 W (D' + 4).
//# body
  if (THIRD) {
    tile_read(s, s_first + batch * s_first_strides[0] + kv * s_first_strides[1] + col0 * s_first_strides[3],
              int(s_first_strides[2]), int(s_first_strides[3]), D, D - col0, at);
  }
  tile_read(f, f_first + batch * f_first_strides[0] + head * f_first_strides[1] + col0 * f_first_strides[3],
            int(f_first_strides[2]), int(f_first_strides[3]), D, DV - col0, at);
  tile_read(p, p_first + batch * p_first_strides[0] + kv * p_first_strides[1] + col0 * p_first_strides[3],
            int(p_first_strides[2]), int(p_first_strides[3]), D, DV - col0, at);
  const Walk walk = block_walk(0, total, total);
  for (int u = AHEAD ? -W : 0; u < total; u += W) {
    const Turn turn = turn_of<AHEAD, W>(u);
    const float decay = stage_chunk<W, D, DV, AHEAD, STAGED>(
        q_room, k_room, v_room, cums, q + q_base, q_strides, k + k_base, k_strides, v + v_base, v_strides, g + g_base,
        g_strides, walk, turn, launch);
    IN_SHARED T* qs = q_room + turn.now * (W * LD);
    IN_SHARED T* ks = k_room + turn.now * (W * LD);
    IN_SHARED Decays<W>& cum = cums[AHEAD ? turn.now : u / W % 2];
    if (u >= 0) {
      const int rows = min(W, total - u);
      Tile<R, NC> right, r;
      walk_first<THIRD, W, LD, LDK, LDP>(s, r, right, qs, ks, kts, ps, cum, scale, col0, launch, at);
      if (THIRD) pass_write(s, ks, LD, right, cum, 1.0f, at);  // S = b_W S + K^T (b_W / b) K
      if (STAGED) {
        tile_take(right, v_room + turn.now * (W * LDV) + col0, LDV, 8 * KV - col0, at);
      } else {
        tile_read(right, v + v_base + u * v_strides[1] + col0 * v_strides[3], int(v_strides[1]), int(v_strides[3]),
                  rows, DV - col0, at);
      }
      walk_values<LD, LDP>(p, r, right, qs, ks, ps, cum, scale, at);
      pass_read<POWER>(right, f, qs, LD, cum, 1.0f, scale, at);  // O = scale b^p Q F
      if (THIRD) {
        sync_threadgroup();
        scores<K>(ps, LDP, qs, LD, kts, LDK, cum, POWER, scale, launch, at);
        sync_threadgroup();
      }
      tile_mma<R, R, NC, false, true>(right, ps, LDP, r, at);  // O += P1 R, or P3 R
      tile_write<T>(right, o + ((long(batch) * total + u) * hq + head) * DV + col0, hq * DV, 1, rows, DV - col0, at);
      if (THIRD) {
        pass_write<POWER>(f, kts, LDK, r, cum, 1.0f, at);  // F = b_W^3 F + K~^T (b_W / b)^3 R
      } else {
        pass_write<POWER>(f, ks, LD, r, cum, 1.0f, at);  // F = b_W F + K^T (b_W / b) R
        if (!AHEAD) sync_threadgroup();
      }
    }
    if (AHEAD) stage_decay(cums[turn.next], decay, 1.0f, launch);
  }
  if (first_of_group) {
    if (THIRD) tile_write<float>(s, s_last + (long(batch) * hkv + kv) * (D * D) + col0, D, 1, D, D - col0, at);
    tile_write<float>(p, p_last + (long(batch) * hkv + kv) * (D * DV) + col0, DV, 1, D, DV - col0, at);
  }
  tile_write<float>(f, f_last + long(bh) * (D * DV) + col0, DV, 1, D, DV - col0, at);
  if (!THIRD && bh == 0 && launch.index == 0) s_last[0] = 0.0f;

//# kernel routed_middle
//# inputs: q k v g s_entry p_entry ints floats
//# outputs: kt routed sums logs s_last p_last
//
// s_entry [B, Hkv, NB, D, D], p_entry [B, Hkv, NB, D, DV] float32, any strides: the states that enter each block.
// ints: L. floats: scale. kt [B, T, Hq, D], routed [B, T, Hq, DV] in TK: K~, r. sums [B, Hq, NB - 1, D, DV], logs
// [B, Hq, NB - 1, 2] float32 of all blocks but the last, as linear_sums(K or K~, r) gives them (logs for p = 1).
// s_last [B, Hkv, D, D], p_last [B, Hkv, D, DV] float32.
// T, TK dtypes, D, DV widths, W chunk, NC stripe, THIRD.
// Threadgroup bytes: as routed_walk.
//# body
  const int block = launch.group.y, blocks = launch.groups.y;
  const Walk walk = block_walk(block, ints[0], total);
  const bool summed = block < blocks - 1;
  SHARED Pair whole[1];  // of the first thread
  if (launch.index == 0) whole[0] = Pair(0.0f, 0.0f);
  if (THIRD) {
    tile_read(s,
              s_entry + batch * s_entry_strides[0] + kv * s_entry_strides[1] + block * s_entry_strides[2] +
                  col0 * s_entry_strides[4],
              int(s_entry_strides[3]), int(s_entry_strides[4]), D, D - col0, at);
  }
  tile_read(p,
            p_entry + batch * p_entry_strides[0] + kv * p_entry_strides[1] + block * p_entry_strides[2] +
                col0 * p_entry_strides[4],
            int(p_entry_strides[3]), int(p_entry_strides[4]), D, DV - col0, at);
  tile_zero(f);
  for (int u = AHEAD ? -W : 0; u < walk.count; u += W) {
    const Turn turn = turn_of<AHEAD, W>(u);
    const float decay = stage_chunk<W, D, DV, AHEAD, STAGED>(
        q_room, k_room, v_room, cums, q + q_base, q_strides, k + k_base, k_strides, v + v_base, v_strides, g + g_base,
        g_strides, walk, turn, launch);
    IN_SHARED T* qs = q_room + turn.now * (W * LD);
    IN_SHARED T* ks = k_room + turn.now * (W * LD);
    IN_SHARED Decays<W>& cum = cums[AHEAD ? turn.now : u / W % 2];
    if (u >= 0) {
      const int rows = min(W, walk.count - u), t = walk.first + u;
      const long token = (long(batch) * total + t) * hq + head;
      Tile<R, NC> right, out;
      walk_first<THIRD, W, LD, LDK, LDP>(s, out, right, qs, ks, kts, ps, cum, scale, col0, launch, at);
      if (THIRD) {
        tile_write<TK>(out, kt + token * D + col0, hq * D, 1, rows, D - col0, at);
        pass_write(s, ks, LD, right, cum, 1.0f, at);
      }
      if (STAGED) {
        tile_take(right, v_room + turn.now * (W * LDV) + col0, LDV, 8 * KV - col0, at);
      } else {
        tile_read(right, v + v_base + t * v_strides[1] + col0 * v_strides[3], int(v_strides[1]), int(v_strides[3]),
                  rows, DV - col0, at);
      }
      walk_values<LD, LDP>(p, out, right, qs, ks, ps, cum, scale, at);
      tile_write<TK>(out, routed + token * DV + col0, hq * DV, 1, rows, DV - col0, at);
      if (THIRD) sync_threadgroup();
      if (summed) {
        if (launch.index == 0) whole[0] = whole[0] + cum.sums[W - 1];
        if (THIRD) {
          pass_write<POWER>(f, kts, LDK, out, cum, 1.0f, at);
        } else {
          pass_write<POWER>(f, ks, LD, out, cum, 1.0f, at);
        }
      }
      if (!THIRD && !AHEAD) sync_threadgroup();
    }
    if (AHEAD) stage_decay(cums[turn.next], decay, 1.0f, launch);
  }
  if (!summed && first_of_group) {
    if (THIRD) tile_write<float>(s, s_last + (long(batch) * hkv + kv) * (D * D) + col0, D, 1, D, D - col0, at);
    tile_write<float>(p, p_last + (long(batch) * hkv + kv) * (D * DV) + col0, DV, 1, D, DV - col0, at);
  }
  if (summed) {
    const long slot = long(bh) * (blocks - 1) + block;
    tile_write<float>(f, sums + slot * (D * DV) + col0, DV, 1, D, DV - col0, at);
    if (launch.index == 0) write_log(logs + 2 * slot, whole[0]);
  }
  if (!THIRD && block == 0 && bh == 0 && launch.index == 0) {
    kt[0] = static_cast<TK>(0.0f);
    s_last[0] = 0.0f;
  }
