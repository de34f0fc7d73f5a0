// First-order linear attention with decay, LA_{g^p}: the primitive that every operator is made of.
//
//     S_t = g_t^p S_{t-1} + y_t z_t^T          o_t = scale S_t^T x_t
//
// x queries [B, T, Hx, DY], y keys [B, T, Hy, DY], z values [B, T, Hz, DZ], g decay [B, T, Hg] float32,
// any strides. A state belongs to each of the Hs = max(Hy, Hz) heads, an output to each of the
// Ho = max(Hx, Hs) heads; every head count divides Ho, Hg divides Hs, and neighbours share what there is less of. The
// sequence is cut into NB blocks of L tokens (L a multiple of W); a block is walked in chunks of W tokens by
// one threadgroup that keeps the state in registers. Three kernels:
//
//     linear_sums   the state that each block adds, and the log decay over it        (grid NB x B Hs)
//     linear_scan   the state that enters each block                                 (element-wise)
//     linear_out    the outputs, and the state after the last token                  (grid NB x B Ho)
//
// The gradients are in backward.metal. They are made of the adjoint of the state, which walks from the last
// token to the first: BACK is that direction of the first two kernels.
//
// Threads: 32 per stripe of 8 NC columns of z, NS = ceil(DZ / (8 NC)) stripes. Registers of a thread in tiles, at
// NC = 2: the state 4 K, two tiles of a chunk W / 2 each: 96 at D = 128, W = 32 (plan.REGISTERS).
// Mirrors mlx_hla.ops.primitive.
//# uses: chunks

// The tokens of one block.
struct Walk {
  int first, count;
};

FUNC Walk block_walk(int block, int length, int total) {
  Walk walk;
  walk.first = block * length;
  walk.count = min(total - walk.first, length);
  return walk;
}

template <typename P>
FUNC void write_log(P log, Pair parts) {
  log[0] = parts[0];
  log[1] = parts[1];
}

// What a pass reads of its state: out = scale b^N X S, b to the `power`. Fences: see the GPU's own words.
template <int N = 1, int R, int K, int NC, typename PX>
FUNC void pass_read(
    OWN Tile<R, NC>& out, OWN State<K, NC>& state, PX x, int ldx, IN_SHARED const Decays<8 * R>& cum, float power,
    float scale, Spot at) {
  tile_zero(out);
  tile_mma<R, K, NC, false, false>(out, x, ldx, state, at);
  tile_decay_from_start<N>(out, cum, power, scale, at);
  fence_loads();
}

// What a pass writes: S = b_W^N S + Y^T (b_W / b)^N right. `right` is used up.
template <int N = 1, int R, int K, int NC, typename PY>
FUNC void pass_write(
    OWN State<K, NC>& state, PY y, int ldy, OWN Tile<R, NC>& right, IN_SHARED const Decays<8 * R>& cum, float power,
    Spot at) {
  fence_loads();
  tile_decay_to_end<N>(right, cum, power, at);
  tile_scale(state, chunk_decay<N>(cum, power));
  tile_mma<K, R, NC, true, false>(state, y, ldy, right, at);
  fence_loads();
}

// The columns from col0 on of a symmetric state, to the end of the chunk y: S = b_W S + Y^T (b_W / b) Y, less the
// blocks below the diagonal.
template <int R, int K, int NC, typename PY>
FUNC void add_symmetric(
    OWN State<K, NC, true>& state, PY y, int ldy, IN_SHARED const Decays<8 * R>& cum, float power, int col0, Spot at) {
  Tile<R, NC> right;
  tile_take_upper(right, y + col0, ldy, 8 * K - col0, at);
  tile_decay_to_end(right, cum, power, at);
  tile_scale(state, chunk_decay(cum, power));
  tile_mma_upper<K, R, NC>(state, y, ldy, right, col0 / 8, at);
}

//# kernel linear_sums
//# inputs: y z g ints floats
//# outputs: sums squares logs
//
// y, z, g: see above. ints: L, the first block M0. floats: p, scale. For M blocks from M0 on, one element, zero,
// where not VALUES or not SQUARES:
// sums [B, Hs, M, DY, DZ] float32: the sum over the block's tokens of (decay to its end)^p y_t z_t^T;
// BACK: of scale (decay from its start through token t)^p y_t z_t^T.
// squares [B, Hs, M, DY, DY] float32: the sum of (decay to its end)^p y_t y_t^T.
// logs [B, Hs, M, 2] float32: log decay over the block in two parts (p = 1).
// TY, TZ dtypes, DY, DZ widths, W chunk, NC stripe, BACK, VALUES, SQUARES.
// Threads: 32 per stripe of the wider of what is summed. Threadgroup bytes: W (DY' + pad) sizeof(TY) + 8 W.
//# body
  constexpr int K = (DY + 7) / 8, R = W / 8, LD = 8 * K + 16 / sizeof(TY), KZ = (DZ + 7) / 8;
  constexpr int LDZ = 8 * KZ + 16 / sizeof(TZ), Y_BYTES = W * LD * sizeof(TY), Z_BYTES = W * LDZ * sizeof(TZ);
  constexpr bool AHEAD = Y_BYTES <= AHEAD_BYTES, STAGED = VALUES && Y_BYTES + Z_BYTES <= AHEAD_BYTES;
  SHARED TY y_room[(AHEAD ? 2 : 1) * W * LD];
  SHARED TZ z_room[STAGED ? 2 * W * LDZ : 1];
  SHARED Decays<W> cums[AHEAD ? 2 : 1];

  const int block = launch.group.y, bh = launch.group.z;
  const int hs = y_shape[2] > z_shape[2] ? y_shape[2] : z_shape[2];
  const int blocks = launch.groups.y;
  const int total = y_shape[1], batch = bh / hs, head = bh % hs;
  const int col0 = 8 * NC * launch.simdgroup;
  const float power = floats[0];
  const Walk walk = block_walk(ints[1] + block, ints[0], total);

  const long y_base = batch * y_strides[0] + (head * y_shape[2] / hs) * y_strides[2];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / hs) * z_strides[2];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / hs) * g_strides[2];

  State<K, NC> state;
  State<K, NC, true> square;
  tile_zero(state);
  tile_zero(square);
  Pair whole = Pair(0.0f, 0.0f);
  const int last_chunk = (walk.count - 1) / W * W;
  for (int n = AHEAD ? -W : 0; n <= last_chunk; n += W) {
    if (AHEAD) sync_staged();
    const Turn turn = turn_of<AHEAD, W>(n);
    float decay = 1.0f;
    if (turn.first <= last_chunk) {
      const int u = BACK ? last_chunk - turn.first : turn.first, rows = min(W, walk.count - u), t = walk.first + u;
      stage<W, 8 * K>(y_room + turn.next * (W * LD), LD, y + y_base, y_strides, t, rows, DY, launch);
      if (STAGED) stage<W, 8 * KZ>(z_room + turn.next * (W * LDZ), LDZ, z + z_base, z_strides, t, rows, DZ, launch);
      decay = lane_decay(g + g_base + t * g_strides[1], g_strides[1], rows, launch);
    }
    if (!AHEAD) {
      stage_decay(cums[0], decay, power, launch);
      sync_staged();
    }
    if (n >= 0) {
      IN_SHARED TY* ys = y_room + turn.now * (W * LD);
      IN_SHARED Decays<W>& cum = cums[turn.now];
      if (SQUARES) add_symmetric<R>(square, ys, LD, cum, power, col0, at);
      if (VALUES) {
        Tile<R, NC> zs;
        if (STAGED) {
          tile_take(zs, z_room + turn.now * (W * LDZ) + col0, LDZ, 8 * KZ - col0, at);
        } else {
          const int u = BACK ? last_chunk - n : n, t = walk.first + u;
          tile_read(zs, z + z_base + t * z_strides[1] + col0 * z_strides[3], int(z_strides[1]), int(z_strides[3]),
                    min(W, walk.count - u), DZ - col0, at);
        }
        if (BACK) {
          tile_decay_from_start(zs, cum, power, floats[1], at);
          tile_scale(state, chunk_decay(cum, power));
          tile_mma<K, R, NC, true, false>(state, ys, LD, zs, at);  // G = b_W G + scale Y^T b Z
        } else {
          pass_write(state, ys, LD, zs, cum, power, at);  // S = b_W S + Y^T (b_W / b) Z
        }
      }
      whole += cum.sums[W - 1];
    }
    if (AHEAD) {
      stage_decay(cums[turn.next], decay, power, launch);
    } else {
      sync_threadgroup();
    }
  }
  const long slot = long(bh) * blocks + block;
  if (SQUARES) tile_write_symmetric(square, squares + slot * (DY * DY), DY, col0, at);
  if (VALUES) tile_write<float>(state, sums + slot * (DY * DZ) + col0, DZ, 1, DY, DZ - col0, at);
  if (slot == 0 && launch.index == 0) {
    if (!SQUARES) squares[0] = 0.0f;
    if (!VALUES) sums[0] = 0.0f;
  }
  if (launch.index == 0) write_log(logs + 2 * slot, whole);

//# kernel linear_scan
//# inputs: sums logs first floats
//# outputs: entry
//
// sums [B, Hs, M, DY, DZ], logs [B, Hs, M, 2] from linear_sums; first [B, Hs, DY, DZ] float32, any
// strides, the state before the walk; floats: p. entry [B, Hs, M + 1, DY, DZ] float32: the state at the
// M + 1 borders of the blocks, in the order of the tokens. A thread owns EACH elements of the state, a threadgroup's
// threads apart, for which it reads the decays once; it reads of several blocks before it adds. BACK starts from the
// last border.
//# body
  constexpr int TURN = EACH < 8 ? 8 / EACH : 1;
  const int height = sums_shape[3], width = sums_shape[4], size = height * width;
  const int heads = sums_shape[1], blocks = sums_shape[2], bh = launch.group.z;
  const int element = launch.group.x * launch.threads * EACH + launch.index;
  const long border = long(bh) * (blocks + 1);
  float state[EACH];
  HLA_UNROLL
  for (int e = 0; e < EACH; e++) {
    const int i = element + e * launch.threads;
    if (i < size) {
      state[e] = first[bh / heads * first_strides[0] + bh % heads * first_strides[1] +
                       i / width * first_strides[2] + i % width * first_strides[3]];
      entry[(border + (BACK ? blocks : 0)) * size + i] = state[e];
    }
  }
  for (int n = 0; n < blocks; n += TURN) {
    float added[TURN][EACH], decay[TURN];
    HLA_UNROLL
    for (int m = 0; m < TURN; m++) {
      if (n + m < blocks) {
        const long slot = long(bh) * blocks + (BACK ? blocks - 1 - n - m : n + m);
        decay[m] = decay_since_start(Pair(logs[2 * slot], logs[2 * slot + 1]), floats[0]);
        HLA_UNROLL
        for (int e = 0; e < EACH; e++) {
          const int i = element + e * launch.threads;
          if (i < size) added[m][e] = sums[slot * size + i];
        }
      }
    }
    HLA_UNROLL
    for (int m = 0; m < TURN; m++) {
      const long place = border + (BACK ? blocks - 1 - n - m : n + m + 1);
      HLA_UNROLL
      for (int e = 0; e < EACH; e++) {
        const int i = element + e * launch.threads;
        if (n + m < blocks && i < size) {
          state[e] = decay[m] * state[e] + added[m][e];
          entry[place * size + i] = state[e];
        }
      }
    }
  }

//# kernel linear_out
//# inputs: x y z g entry ints floats
//# outputs: o last
//
// x, y, z, g: see above. entry [B, Hs, NB, DY, DZ] float32, any strides. ints: L. floats: p, scale.
// o [B, T, Ho, DZ] in TO; last [B, Hs, DY, DZ] float32, the state after the last token, written by the first of
// the heads that share it.
// TX, TY, TZ, TO dtypes, DY, DZ widths, W chunk, NC stripe; SAME: z is y, which is read once.
// Threadgroup bytes: W (DY' + pad) (sizeof(TX) + sizeof(TY)) + 4 W (W + 4) + 8 W.
//# body
  constexpr int K = (DY + 7) / 8, R = W / 8, LDX = 8 * K + 16 / sizeof(TX), LDY = 8 * K + 16 / sizeof(TY);
  constexpr int LDP = W + 16 / sizeof(Score), KZ = (DZ + 7) / 8, LDZ = 8 * KZ + 16 / sizeof(TZ);
  constexpr int XY_BYTES = W * (LDX * sizeof(TX) + LDY * sizeof(TY)), Z_BYTES = W * LDZ * sizeof(TZ);
  constexpr bool AHEAD = XY_BYTES <= AHEAD_BYTES, STAGED = !SAME && XY_BYTES + Z_BYTES <= AHEAD_BYTES;
  SHARED TX x_room[(AHEAD ? 2 : 1) * W * LDX];
  SHARED TY y_room[(AHEAD ? 2 : 1) * W * LDY];
  SHARED TZ z_room[STAGED ? 2 * W * LDZ : 1];
  SHARED Score ps[W * LDP];
  SHARED Decays<W> cums[AHEAD ? 2 : 1];

  const int block = launch.group.y, bh = launch.group.z;
  const int hs = entry_shape[1], ho = max(int(x_shape[2]), hs), blocks = launch.groups.y;
  const int total = x_shape[1], batch = bh / ho, head = bh % ho, shead = head * hs / ho;
  const int col0 = 8 * NC * launch.simdgroup;
  const float power = floats[0], scale = floats[1];
  const Walk walk = block_walk(block, ints[0], total);

  const long x_base = batch * x_strides[0] + (head * x_shape[2] / ho) * x_strides[2];
  const long y_base = batch * y_strides[0] + (head * y_shape[2] / ho) * y_strides[2];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / ho) * z_strides[2];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / ho) * g_strides[2];

  State<K, NC> state;
  tile_read(state,
            entry + batch * entry_strides[0] + shead * entry_strides[1] + block * entry_strides[2] +
                col0 * entry_strides[4],
            int(entry_strides[3]), int(entry_strides[4]), DY, DZ - col0, at);
  for (int u = AHEAD ? -W : 0; u < walk.count; u += W) {
    if (AHEAD) sync_staged();
    const Turn turn = turn_of<AHEAD, W>(u);
    float decay = 1.0f;
    if (turn.first < walk.count) {
      const int rows = min(W, walk.count - turn.first), t = walk.first + turn.first;
      stage<W, 8 * K>(x_room + turn.next * (W * LDX), LDX, x + x_base, x_strides, t, rows, DY, launch);
      stage<W, 8 * K>(y_room + turn.next * (W * LDY), LDY, y + y_base, y_strides, t, rows, DY, launch);
      if (STAGED) stage<W, 8 * KZ>(z_room + turn.next * (W * LDZ), LDZ, z + z_base, z_strides, t, rows, DZ, launch);
      decay = lane_decay(g + g_base + t * g_strides[1], g_strides[1], rows, launch);
    }
    if (!AHEAD) {
      stage_decay(cums[0], decay, power, launch);
      sync_staged();
    }
    if (u >= 0) {
      IN_SHARED TX* xs = x_room + turn.now * (W * LDX);
      IN_SHARED TY* ys = y_room + turn.now * (W * LDY);
      IN_SHARED Decays<W>& cum = cums[turn.now];
      const int rows = min(W, walk.count - u), t = walk.first + u;
      scores<K>(ps, LDP, xs, LDX, ys, LDY, cum, power, scale, launch, at);
      Tile<R, NC> zs, os;
      if (SAME) {
        tile_take(zs, ys + col0, LDY, 8 * K - col0, at);
      } else if (STAGED) {
        tile_take(zs, z_room + turn.now * (W * LDZ) + col0, LDZ, 8 * KZ - col0, at);
      } else {
        tile_read(zs, z + z_base + t * z_strides[1] + col0 * z_strides[3], int(z_strides[1]), int(z_strides[3]), rows,
                  DZ - col0, at);
      }
      pass_read(os, state, xs, LDX, cum, power, scale, at);  // O = scale b X S
      sync_threadgroup();
      tile_mma<R, R, NC, false, true>(os, ps, LDP, zs, at);  // O += P Z
      tile_write<TO>(os, o + ((long(batch) * total + t) * ho + head) * DZ + col0, ho * DZ, 1, rows, DZ - col0, at);
      pass_write(state, ys, LDY, zs, cum, power, at);  // S = b_W S + Y^T (b_W / b) Z
    }
    if (AHEAD) {
      stage_decay(cums[turn.next], decay, power, launch);
    } else {
      sync_threadgroup();
    }
  }
  if (block == blocks - 1 && head % (ho / hs) == 0) {
    tile_write<float>(state, last + (long(batch) * hs + shead) * (DY * DZ) + col0, DZ, 1, DY, DZ - col0, at);
  }
