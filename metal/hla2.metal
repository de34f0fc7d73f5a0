// Second-order HLA, masked: K~ = LA_g(Q, K, K) and O = LA_{g^2}(Q, K~, V) in one walk.
//
//     S_t = g_t S_{t-1} + k_t k_t^T      k~_t = scale (S_t + ridge I) q_t
//     F_t = g_t^2 F_{t-1} + k~_t v_t^T   o_t = scale F_t^T q_t
//
// q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, DV], g [B, T, Hg] float32, any strides; S belongs to a
// key-value head, F to a query head. A tile of q, k, v is read once per pass, Q K^T formed once. A chunk:
//
//     P  = scale D (Q K^T)            K~ = P K + scale b Q S + scale ridge Q      S = b_W S + K^T (b_W / b) K
//     P' = scale D^2 (Q K~^T)         O  = P' V + scale b^2 Q F                   F = b_W^2 F + K~^T (b_W / b)^2 V
//
//     hla2_walk     everything, one threadgroup per head from the first token to the last (grid 1 x B Hq)
//     hla2_middle   K~, and what each block adds to F                                    (grid NB x B Hq)
//
// A long sequence of few heads: linear_sums(k, k) and linear_scan give S at the blocks' borders, then
// hla2_middle, then linear_scan gives F there and linear_out(q, K~, v) the outputs.
//
// Threads: 32 per stripe of 8 NC columns of k or v, whichever has more. Registers of a thread in tiles: S and F
// 2 K NC each, two tiles of a chunk W NC / 4 each: 96 at D = 64, NC = 2, W = 32; 64 at D = 96, NC = 1 (plan.FUSED).
// Mirrors mlx_hla.ops.hla2.
//# uses: linear

// What comes before the work on a chunk, see chunks.metal: q, k and, where STAGED, v of the next. Its decay is
// returned; unless AHEAD its sums alternate, so that they wait for nobody.
template <int W, int D, int DV, bool AHEAD, bool STAGED, typename T, typename P, typename G, typename S>
FUNC float stage_chunk(
    IN_SHARED T* qs, IN_SHARED T* ks, IN_SHARED T* vs, IN_SHARED Decays<W>* cums, P q, S q_strides, P k, S k_strides,
    P v, S v_strides, G g, S g_strides, Walk walk, Turn turn, Launch launch) {
  constexpr int PAD = 16 / sizeof(T), M = (D + 7) / 8 * 8, MV = (DV + 7) / 8 * 8, LD = M + PAD, LDV = MV + PAD;
  const int rows = min(W, walk.count - turn.first), t = walk.first + turn.first, room = turn.next * W;
  float decay = 1.0f;
  if (AHEAD) sync_staged();
  if (rows > 0) {
    stage<W, M>(qs + room * LD, LD, q, q_strides, t, rows, D, launch);
    stage<W, M>(ks + room * LD, LD, k, k_strides, t, rows, D, launch);
    if (STAGED) stage<W, MV>(vs + room * LDV, LDV, v, v_strides, t, rows, DV, launch);
    decay = lane_decay(g + t * g_strides[1], g_strides[1], rows, launch);
  }
  if (!AHEAD) {
    stage_decay(cums[turn.first / W % 2], decay, 1.0f, launch);
    sync_staged();
  }
  return decay;
}

// The first pass over a chunk that is staged: K~ to kts, this simdgroup's columns of it also to `out`, and those of K
// to `right`, for pass_write of S. ps is scratch. One barrier inside; kts is to be read after the next.
template <int W, int LD, int LDK, int LDP, int K, int R, int NC, typename T>
FUNC void walk_keys(
    OWN State<K, NC>& s, OWN Tile<R, NC>& out, OWN Tile<R, NC>& right, IN_SHARED T* qs, IN_SHARED T* ks,
    IN_SHARED Score* kts, IN_SHARED Score* ps, IN_SHARED const Decays<W>& cum, float scale, float ridge, int col0,
    Launch launch, Spot at) {
  scores<K>(ps, LDP, qs, LD, ks, LD, cum, 1.0f, scale, launch, at);
  pass_read(out, s, qs, LD, cum, 1.0f, scale, at);  // K~ = scale b Q S
  if (ridge != 0.0f) tile_add(out, qs + col0, LD, 8 * K - col0, scale * ridge, at);  // K~ += scale ridge Q
  tile_take(right, ks + col0, LD, 8 * K - col0, at);
  sync_threadgroup();
  tile_mma<R, R, NC, false, true>(out, ps, LDP, right, at);  // K~ += P K
  tile_put(out, kts + col0, LDK, 8 * K - col0, at);
}

//# before each body
  constexpr int K = (D + 7) / 8, R = W / 8, LD = 8 * K + 16 / sizeof(T), PAD = 16 / sizeof(Score), KV = (DV + 7) / 8;
  constexpr int LDK = 8 * K + PAD, LDP = W + PAD, LDV = 8 * KV + 16 / sizeof(T);
  // MORE: what K~ has beyond one of halves.
  constexpr int MORE = W * LDK * (sizeof(Score) - 2), QK_BYTES = 2 * W * LD * sizeof(T) + MORE;
  constexpr bool AHEAD = QK_BYTES <= AHEAD_BYTES, STAGED = QK_BYTES + W * LDV * sizeof(T) <= AHEAD_BYTES;
  SHARED T q_room[(AHEAD ? 2 : 1) * W * LD];
  SHARED T k_room[(AHEAD ? 2 : 1) * W * LD];
  SHARED T v_room[STAGED ? 2 * W * LDV : 1];
  SHARED Score kts[W * LDK];
  SHARED Score ps[W * LDP];
  SHARED Decays<W> cums[2];

  const int total = q_shape[1], hq = q_shape[2], hkv = k_shape[2];
  const int bh = launch.group.z, batch = bh / hq, head = bh % hq, kv = head * hkv / hq;
  const int col0 = 8 * NC * launch.simdgroup;
  const float scale = floats[0], ridge = floats[1];
  const long q_base = batch * q_strides[0] + head * q_strides[2];
  const long k_base = batch * k_strides[0] + kv * k_strides[2];
  const long v_base = batch * v_strides[0] + kv * v_strides[2];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / hq) * g_strides[2];

  State<K, NC> s, f;
//# end

//# kernel hla2_walk
//# inputs: q k v g s_first f_first floats
//# outputs: o s_last f_last
//
// s_first [B, Hkv, D, D] and f_first [B, Hq, D, DV] float32, any strides. floats: scale, ridge.
// o [B, T, Hq, DV] in T; s_last, f_last as s_first, f_first, contiguous.
// T dtype, D, DV widths, W chunk, NC stripe.
// Threadgroup bytes: 2 W (D' + pad) sizeof(T) + 4 W (D' + 4) + 4 W (W + 4) + 16 W.
//# body
  tile_read(s, s_first + batch * s_first_strides[0] + kv * s_first_strides[1] + col0 * s_first_strides[3],
            int(s_first_strides[2]), int(s_first_strides[3]), D, D - col0, at);
  tile_read(f, f_first + batch * f_first_strides[0] + head * f_first_strides[1] + col0 * f_first_strides[3],
            int(f_first_strides[2]), int(f_first_strides[3]), D, DV - col0, at);
  const Walk walk = block_walk(0, total, total);
  for (int u = AHEAD ? -W : 0; u < walk.count; u += W) {
    const Turn turn = turn_of<AHEAD, W>(u);
    const float decay = stage_chunk<W, D, DV, AHEAD, STAGED>(
        q_room, k_room, v_room, cums, q + q_base, q_strides, k + k_base, k_strides, v + v_base, v_strides, g + g_base,
        g_strides, walk, turn, launch);
    if (u >= 0) {
      IN_SHARED T* qs = q_room + turn.now * (W * LD);
      IN_SHARED T* ks = k_room + turn.now * (W * LD);
      IN_SHARED Decays<W>& cum = cums[AHEAD ? turn.now : u / W % 2];
      const int rows = min(W, total - u);
      Tile<R, NC> right, out;
      walk_keys<W, LD, LDK, LDP>(s, out, right, qs, ks, kts, ps, cum, scale, ridge, col0, launch, at);
      pass_write(s, ks, LD, right, cum, 1.0f, at);  // S = b_W S + K^T (b_W / b) K
      sync_threadgroup();
      scores<K>(ps, LDP, qs, LD, kts, LDK, cum, 2.0f, scale, launch, at);
      if (STAGED) {
        tile_take(right, v_room + turn.now * (W * LDV) + col0, LDV, 8 * KV - col0, at);
      } else {
        tile_read(right, v + v_base + u * v_strides[1] + col0 * v_strides[3], int(v_strides[1]), int(v_strides[3]),
                  rows, DV - col0, at);
      }
      pass_read<2>(out, f, qs, LD, cum, 1.0f, scale, at);  // O = scale b^2 Q F
      sync_threadgroup();
      tile_mma<R, R, NC, false, true>(out, ps, LDP, right, at);  // O += P' V
      tile_write<T>(out, o + ((long(batch) * total + u) * hq + head) * DV + col0, hq * DV, 1, rows, DV - col0, at);
      pass_write<2>(f, kts, LDK, right, cum, 1.0f, at);  // F = b_W^2 F + K~^T (b_W / b)^2 V
    }
    if (AHEAD) stage_decay(cums[turn.next], decay, 1.0f, launch);
  }
  if (head % (hq / hkv) == 0) {
    tile_write<float>(s, s_last + (long(batch) * hkv + kv) * (D * D) + col0, D, 1, D, D - col0, at);
  }
  tile_write<float>(f, f_last + long(bh) * (D * DV) + col0, DV, 1, D, DV - col0, at);

//# kernel hla2_middle
//# inputs: q k v g entry ints floats
//# outputs: kt sums logs s_last
//
// entry [B, Hkv, NB, D, D] float32, any strides: S entering each block. ints: L. floats: scale, ridge.
// kt [B, T, Hq, D] in TK: K~. sums [B, Hq, NB - 1, D, DV], logs [B, Hq, NB - 1, 2] float32 of all blocks
// but the last, as linear_sums(K~, v) with p = 2 gives them (logs for p = 1). s_last [B, Hkv, D, D] float32.
// T, TK dtypes, D, DV widths, W chunk, NC stripe.
// Threadgroup bytes: 2 W (D' + pad) sizeof(T) + 4 W (D' + 4) + 4 W (W + 4) + 16 W.
//# body
  const int block = launch.group.y, blocks = launch.groups.y;
  const Walk walk = block_walk(block, ints[0], total);
  const bool summed = block < blocks - 1;
  tile_read(s,
            entry + batch * entry_strides[0] + kv * entry_strides[1] + block * entry_strides[2] +
                col0 * entry_strides[4],
            int(entry_strides[3]), int(entry_strides[4]), D, D - col0, at);
  tile_zero(f);
  SHARED Pair whole[1];  // of the first thread
  if (launch.index == 0) whole[0] = Pair(0.0f, 0.0f);
  for (int u = AHEAD ? -W : 0; u < walk.count; u += W) {
    const Turn turn = turn_of<AHEAD, W>(u);
    const float decay = stage_chunk<W, D, DV, AHEAD, STAGED>(
        q_room, k_room, v_room, cums, q + q_base, q_strides, k + k_base, k_strides, v + v_base, v_strides, g + g_base,
        g_strides, walk, turn, launch);
    if (u >= 0) {
      IN_SHARED T* ks = k_room + turn.now * (W * LD);
      IN_SHARED Decays<W>& cum = cums[AHEAD ? turn.now : u / W % 2];
      const int rows = min(W, walk.count - u), t = walk.first + u;
      Tile<R, NC> right, out;
      walk_keys<W, LD, LDK, LDP>(
          s, out, right, q_room + turn.now * (W * LD), ks, kts, ps, cum, scale, ridge, col0, launch, at);
      tile_write<TK>(out, kt + ((long(batch) * total + t) * hq + head) * D + col0, hq * D, 1, rows, D - col0, at);
      pass_write(s, ks, LD, right, cum, 1.0f, at);  // S = b_W S + K^T (b_W / b) K
      if (summed && !STAGED) {
        tile_read(right, v + v_base + t * v_strides[1] + col0 * v_strides[3], int(v_strides[1]), int(v_strides[3]),
                  rows, DV - col0, at);
      }
      sync_threadgroup();
      if (summed) {
        if (STAGED) tile_take(right, v_room + turn.now * (W * LDV) + col0, LDV, 8 * KV - col0, at);
        pass_write<2>(f, kts, LDK, right, cum, 1.0f, at);  // F = b_W^2 F + K~^T (b_W / b)^2 V
        if (launch.index == 0) whole[0] = whole[0] + cum.sums[W - 1];
      }
    }
    if (AHEAD) stage_decay(cums[turn.next], decay, 1.0f, launch);
  }
  if (!summed && head % (hq / hkv) == 0) {
    tile_write<float>(s, s_last + (long(batch) * hkv + kv) * (D * D) + col0, D, 1, D, D - col0, at);
  }
  if (summed) {
    const long slot = long(bh) * (blocks - 1) + block;
    tile_write<float>(f, sums + slot * (D * DV) + col0, DV, 1, D, DV - col0, at);
    if (launch.index == 0) write_log(logs + 2 * slot, whole[0]);
  }
