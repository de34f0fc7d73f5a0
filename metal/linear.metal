// First-order linear attention with decay, LA_{g^p}: the primitive that every operator is made of.
//
//     S_t = g_t^p S_{t-1} + write y_t z_t^T          o_t = read S_t^T x_t
//
// x queries [B, T, Hx, DY], y keys [B, T, Hy, DY], z values [B, T, Hz, DZ], g decay [B, T, Hg] float32,
// any strides. A state belongs to each of the Hs = max(Hy, Hz) heads, an output to each of the
// Ho = max(Hx, Hs) heads; every head count divides Ho, and neighbours share what there is less of. The sequence is cut into NB blocks of L tokens (L a multiple of W); a block is walked in chunks
// of W tokens by one threadgroup that keeps the state in registers. Three kernels:
//
//     linear_sums   the state that each block adds, and the log decay over it        (grid NB x B Hs)
//     linear_scan   the state that enters each block                                 (element-wise)
//     linear_out    the outputs, and the state after the last token                  (grid NB x B Ho)
//
// REV walks every block from its last token to its first, which is the adjoint of the same operator:
// with token t's decay g_{t+1} (1 at the last token), o_t = read write sum_{i >= t} (x_t . y_i) D_it z_i.
// The gradients are three calls: dx = LA(do, z, y), dy = REV LA(z, do, x), dz = REV LA(y, x, do).
//
// Threads: 32 per stripe of 8 NC columns of z, NS = ceil(DZ / (8 NC)) stripes.
// Mirrors mlx_hla.ops.primitive.

// Where one block's walk stands in the tokens: u counts along the walk, token t lies at u = 0..count.
struct Walk {
  int first;  // token of u = 0
  int step;   // 1, or -1 in reverse
  int count;  // tokens in the block
};

template <bool REV>
METAL_FUNC Walk block_walk(int block, int length, int total) {
  int from = block * length;
  int to = min(total, from + length);
  Walk walk;
  walk.first = REV ? to - 1 : from;
  walk.step = REV ? -1 : 1;
  walk.count = to - from;
  return walk;
}

// Decay of the token at walk position u, 1 outside the block: in reverse the decay between a token and
// the one before it in the walk is the later token's.
template <bool REV, typename G>
METAL_FUNC float walk_decay(G g, long step, Walk walk, int u, int total) {
  int t = walk.first + walk.step * u + (REV ? 1 : 0);
  return u < walk.count && t < total ? g[t * step] : 1.0f;
}

//# kernel linear_sums
//# inputs: y z g ints floats
//# outputs: sums logs
//
// y, z, g: see above. ints: L, the first block M0. floats: p, read, write. For M blocks from M0 on:
// sums [B, Hs, M, DY, DZ] float32: write times the sum over the block's tokens of
// (decay to its end)^p y_t z_t^T.
// logs [B, Hs, M, 2] float32: log decay over the block in two parts (p = 1).
// TY dtype, DY, DZ widths, W chunk, NC stripe, REV; SAME: z is y, which is read once, and the sum is
// symmetric: only its upper triangle of blocks is computed.
// Threadgroup bytes: W (DY' + pad) sizeof(TY) + 8 W.
//# body
  constexpr int K = (DY + 7) / 8, R = W / 8, LD = 8 * K + 16 / sizeof(TY);
  threadgroup TY ys[W * LD];
  threadgroup float2 cum[W];

  const int thread_index = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  const int block = threadgroup_position_in_grid.y, bh = threadgroup_position_in_grid.z;
  const int hs = y_shape[2] > z_shape[2] ? y_shape[2] : z_shape[2];
  const int blocks = threadgroups_per_grid.y;
  const int total = y_shape[1], batch = bh / hs, head = bh % hs;
  const Spot at = lane_spot(thread_index_in_simdgroup);
  const int col0 = 8 * NC * simdgroup_index_in_threadgroup;
  const float power = floats[0], write = floats[2];
  const Walk walk = block_walk<REV>(ints[1] + block, ints[0], total);

  const long y_base = batch * y_strides[0] + (head * y_shape[2] / hs) * y_strides[2];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / hs) * z_strides[2] + col0 * z_strides[3];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / hs) * g_strides[2];

  Tile<K, NC> state;
  tile_zero(state);
  float2 whole = float2(0.0f, 0.0f);
  for (int u = 0; u < walk.count; u += W) {
    const int rows = min(W, walk.count - u), t = walk.first + walk.step * u;
    stage<W, 8 * K>(ys, LD, y + y_base + t * y_strides[1], walk.step * int(y_strides[1]), int(y_strides[3]), rows,
                    DY, thread_index, threads);
    if (simdgroup_index_in_threadgroup == 0) {
      const int lane = thread_index_in_simdgroup;
      const float decay = lane < W ? walk_decay<REV>(g + g_base, g_strides[1], walk, u + lane, total) : 1.0f;
      decay_sums(cum, W, decay, LOG_ZERO, float2(0.0f, 0.0f), lane);
    }
    sync_threadgroup();
    Tile<R, NC> zs;
    if (SAME) {
      tile_read(zs, ys + col0, LD, 1, W, 8 * K - col0, at);
    } else {
      tile_read(zs, z + z_base + t * z_strides[1], walk.step * int(z_strides[1]), int(z_strides[3]), rows,
                DZ - col0, at);
    }
    tile_decay_to_end(zs, cum, power, write, at);
    tile_scale(state, decay_since_start(cum[W - 1], power));
    if (SAME) {
      tile_mma_upper<K, R, NC>(state, ys, LD, zs, col0 / 8, at);
    } else {
      tile_mma<K, R, NC, true, false>(state, ys, LD, zs, at);  // S = b_W S + write Y^T (b_W / b) Z
    }
    whole += cum[W - 1];
    sync_threadgroup();
  }
  const long slot = long(bh) * blocks + block;
  if (SAME) {
    tile_write_symmetric(state, sums + slot * (DY * DZ), DZ, col0, at);
  } else {
    tile_write<float>(state, sums + slot * (DY * DZ) + col0, DZ, 1, DY, DZ - col0, at);
  }
  if (thread_index < 2) logs[2 * slot + thread_index] = whole[thread_index];

//# kernel linear_scan
//# inputs: sums logs first floats
//# outputs: entry
//
// sums [B, Hs, M, DY, DZ], logs [B, Hs, M, 2] from linear_sums; first [B, Hs, DY, DZ] float32, any
// strides, the state before the walk; floats: p. entry [B, Hs, M + 1, DY, DZ] float32: the state at the
// M + 1 borders of the blocks, in the order of the tokens. A thread owns one element of the state.
// T: none; REV starts from the last border.
//# body
  const int height = sums_shape[3], width = sums_shape[4], size = height * width;
  const int heads = sums_shape[1], blocks = sums_shape[2];
  const int element = thread_position_in_grid.x, bh = thread_position_in_grid.y;
  if (element < size) {
    float state = first[bh / heads * first_strides[0] + bh % heads * first_strides[1] +
                        element / width * first_strides[2] + element % width * first_strides[3]];
    const long border = long(bh) * (blocks + 1);
    entry[(border + (REV ? blocks : 0)) * size + element] = state;
    for (int n = 0; n < blocks; n++) {
      const int block = REV ? blocks - 1 - n : n;
      const long slot = long(bh) * blocks + block;
      state *= decay_since_start(float2(logs[2 * slot], logs[2 * slot + 1]), floats[0]);
      state += sums[slot * size + element];
      entry[(border + block + (REV ? 0 : 1)) * size + element] = state;
    }
  }

//# kernel linear_out
//# inputs: x y z g entry ints floats
//# outputs: o last
//
// x, y, z, g: see above. entry [B, Hs, NB, DY, DZ] float32, any strides (a transposed view serves the
// backward). ints: L. floats: p, read, write. o [B, T, Ho, DZ] in TO; last [B, Hs, DY, DZ] float32, the state
// after the walk's last token, written by the first of the heads that share it.
// TX, TY, TZ, TO dtypes, DY, DZ widths, W chunk, NC stripe, REV.
// Threadgroup bytes: W (DY' + pad) (sizeof(TX) + sizeof(TY)) + 4 W (W + 4) + 8 W.
//# body
  constexpr int K = (DY + 7) / 8, R = W / 8, LDX = 8 * K + 16 / sizeof(TX), LDY = 8 * K + 16 / sizeof(TY);
  constexpr int LDP = W + 4;
  threadgroup TX xs[W * LDX];
  threadgroup TY ys[W * LDY];
  threadgroup float ps[W * LDP];
  threadgroup float2 cum[W];

  const int thread_index = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  const int simdgroup = simdgroup_index_in_threadgroup;
  const int block = threadgroup_position_in_grid.y, bh = threadgroup_position_in_grid.z;
  const int hs = entry_shape[1], ho = max(int(x_shape[2]), hs), blocks = threadgroups_per_grid.y;
  const int total = x_shape[1], batch = bh / ho, head = bh % ho, shead = head * hs / ho;
  const Spot at = lane_spot(thread_index_in_simdgroup);
  const int col0 = 8 * NC * simdgroup;
  const float power = floats[0], read = floats[1], write = floats[2];
  const Walk walk = block_walk<REV>(block, ints[0], total);

  const long x_base = batch * x_strides[0] + (head * x_shape[2] / ho) * x_strides[2];
  const long y_base = batch * y_strides[0] + (head * y_shape[2] / ho) * y_strides[2];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / ho) * z_strides[2] + col0 * z_strides[3];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / ho) * g_strides[2];

  Tile<K, NC> state;
  tile_read(state,
            entry + batch * entry_strides[0] + shead * entry_strides[1] + block * entry_strides[2] +
                col0 * entry_strides[4],
            int(entry_strides[3]), int(entry_strides[4]), DY, DZ - col0, at);
  for (int u = 0; u < walk.count; u += W) {
    const int rows = min(W, walk.count - u), t = walk.first + walk.step * u;
    stage<W, 8 * K>(xs, LDX, x + x_base + t * x_strides[1], walk.step * int(x_strides[1]), int(x_strides[3]), rows,
                    DY, thread_index, threads);
    stage<W, 8 * K>(ys, LDY, y + y_base + t * y_strides[1], walk.step * int(y_strides[1]), int(y_strides[3]), rows,
                    DY, thread_index, threads);
    if (simdgroup == 0) {
      const int lane = thread_index_in_simdgroup;
      const float decay = lane < W ? walk_decay<REV>(g + g_base, g_strides[1], walk, u + lane, total) : 1.0f;
      decay_sums(cum, W, decay, LOG_ZERO, float2(0.0f, 0.0f), lane);
    }
    sync_threadgroup();
    scores<W, K>(ps, LDP, xs, LDX, ys, LDY, cum, power, read * write, simdgroup, threads / 32, at);
    Tile<R, NC> zs, os;
    tile_read(zs, z + z_base + t * z_strides[1], walk.step * int(z_strides[1]), int(z_strides[3]), rows, DZ - col0,
              at);
    tile_zero(os);
    tile_mma<R, K, NC, false, false>(os, xs, LDX, state, at);  // O = read b X S
    tile_decay_from_start(os, cum, power, read, at);
    sync_threadgroup();
    tile_mma<R, R, NC, false, true>(os, ps, LDP, zs, at);  // O += P Z
    tile_write<TO>(os, o + ((long(batch) * total + t) * ho + head) * DZ + col0, walk.step * ho * DZ, 1, rows,
                   DZ - col0, at);
    tile_decay_to_end(zs, cum, power, write, at);
    tile_scale(state, decay_since_start(cum[W - 1], power));
    tile_mma<K, R, NC, true, false>(state, ys, LDY, zs, at);  // S = b_W S + write Y^T (b_W / b) Z
    sync_threadgroup();
  }
  if (block == (REV ? 0 : blocks - 1) && head % (ho / hs) == 0) {
    tile_write<float>(state, last + (long(batch) * hs + shead) * (DY * DZ) + col0, DZ, 1, DY, DZ - col0, at);
  }

//# kernel linear_decay
//# inputs: x y z d g before after floats
//# outputs: r
//
// d [B, T, Ho, DZ] is the gradient of o. before [B, Hs, N + 1, DY, DZ] and after [B, Ho, N + 1, DY, DZ]:
// the states at the borders of N chunks of W tokens, before from the forward walk and after from the
// reverse walk (the gradients), as linear_scan gives them; floats: p, read, write, log of the least decay.
// r [B, T, Ho] float32: the sum of all terms of <d, o> + <gradient of the last state, last state> that
// hold the decay of token t, so that the gradient of g_t is p r_t / g_t. A decay of 0 counts as the least
// decay here, which the division takes out again. With M_ij = read write D_ij^p (x_i . y_j)(d_i . z_j):
//
//     r_t = sum_{i >= t > j} M_ij + sum_{i >= t} a_i + sum_{j < t} c_j + whole
//     a_i = read b_i^p x_i^T S d_i    c_j = (b_end / b_j)^p y_j^T G z_j    whole = b_end^p <S, G>
//
// with S before the chunk and G after it. Nothing is subtracted, so a tiny r_t keeps its digits.
// x and y, then d and z, are staged in the same room.
// TX, TY, TZ, TD dtypes, DY, DZ widths, W chunk, NC stripe, ROOM floats that hold either pair.
// Threadgroup bytes: 4 ROOM + 4 W (W / 4 + 8 + 1 + 2 NS) + 8 (W + 1) + 4 NS.
//# body
  constexpr int K = (DY + 7) / 8, KZ = (DZ + 7) / 8, R = W / 8, NS = (DZ + 8 * NC - 1) / (8 * NC);
  constexpr int LDX = 8 * K + 16 / sizeof(TX), LDY = 8 * K + 16 / sizeof(TY);
  constexpr int LDD = 8 * KZ + 16 / sizeof(TD), LDZ = 8 * KZ + 16 / sizeof(TZ);
  constexpr int PAIRS = (R * (R + 1) / 2 + NS - 1) / NS;
  threadgroup float room[ROOM];
  threadgroup float by_row[W * R], by_col[W * R], diagonal[W * 8], tails[W];
  threadgroup float reads[NS * W], writes[NS * W], wholes[NS];
  threadgroup float2 cum[W + 1];
  threadgroup TX* xs = reinterpret_cast<threadgroup TX*>(room);
  threadgroup TY* ys = reinterpret_cast<threadgroup TY*>(xs + W * LDX);
  threadgroup TD* ds = reinterpret_cast<threadgroup TD*>(room);
  threadgroup TZ* zs = reinterpret_cast<threadgroup TZ*>(ds + W * LDD);

  const int thread_index = thread_index_in_threadgroup, threads = threads_per_threadgroup.x;
  const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
  const int chunk = threadgroup_position_in_grid.y, bh = threadgroup_position_in_grid.z;
  const int ho = d_shape[2], hs = before_shape[1], total = d_shape[1], batch = bh / ho, head = bh % ho;
  const Spot at = lane_spot(lane);
  const int col0 = 8 * NC * simdgroup, t0 = chunk * W, rows = min(W, total - t0);
  const float power = floats[0], read = floats[1], write = floats[2];

  const long x_base = batch * x_strides[0] + (head * x_shape[2] / ho) * x_strides[2] + t0 * x_strides[1];
  const long y_base = batch * y_strides[0] + (head * y_shape[2] / ho) * y_strides[2] + t0 * y_strides[1];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / ho) * z_strides[2] + t0 * z_strides[1];
  const long d_base = batch * d_strides[0] + head * d_strides[2] + t0 * d_strides[1];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / ho) * g_strides[2];

  stage<W, 8 * K>(xs, LDX, x + x_base, int(x_strides[1]), int(x_strides[3]), rows, DY, thread_index, threads);
  stage<W, 8 * K>(ys, LDY, y + y_base, int(y_strides[1]), int(y_strides[3]), rows, DY, thread_index, threads);
  if (simdgroup == 0) {  // 32 tokens at a time, and the token after the chunk: its decay stands before G
    float2 sum = float2(0.0f, 0.0f);
    for (int r = 0; r <= W; r += 32) {
      const int token = r + lane;
      const bool inside = token < rows || (token == W && t0 + W < total);
      const float decay = inside ? g[g_base + (t0 + token) * g_strides[1]] : 1.0f;
      sum += decay_sums(cum + r, min(32, W + 1 - r), decay, floats[3], sum, lane);
    }
  }
  sync_threadgroup();

  // The scores x y^T of this simdgroup's blocks, the last row of blocks first; they wait for d z^T.
  Tile<PAIRS, 1> pairs;
  tile_zero(pairs);
  HLA_UNROLL
  for (int n = 0; n < PAIRS; n++) {
    const int2 ij = triangle_block(simdgroup + n * NS);
    if (ij[0] < R) block_mma<K>(pairs.f[n][0], xs + 8 * ij[0] * LDX, LDX, ys + 8 * ij[1] * LDY, LDY, at);
  }
  {
    Tile<K, NC> s, grad;
    tile_read(s,
              before + batch * before_strides[0] + (head * hs / ho) * before_strides[1] + chunk * before_strides[2] +
                  col0 * before_strides[4],
              int(before_strides[3]), int(before_strides[4]), DY, DZ - col0, at);
    tile_read(grad,
              after + batch * after_strides[0] + head * after_strides[1] + (chunk + 1) * after_strides[2] +
                  col0 * after_strides[4],
              int(after_strides[3]), int(after_strides[4]), DY, DZ - col0, at);
    const float product = lanes_sum(tile_dot(s, grad));
    if (lane == 0) wholes[simdgroup] = product;
    for (int r = 0; r < R; r++) {  // a and c: this simdgroup's columns of x S and y G against d and z
      Tile<1, NC> product_tile, other;
      tile_zero(product_tile);
      tile_mma<1, K, NC, false, false>(product_tile, xs + 8 * r * LDX, LDX, s, at);
      tile_read(other, d + d_base + 8 * r * d_strides[1] + col0 * d_strides[3], int(d_strides[1]), int(d_strides[3]),
                rows - 8 * r, DZ - col0, at);
      float sum = row_sum(tile_dot(product_tile, other));
      if (at.col == 0) reads[simdgroup * W + 8 * r + at.row] = sum;
      tile_zero(product_tile);
      tile_mma<1, K, NC, false, false>(product_tile, ys + 8 * r * LDY, LDY, grad, at);
      tile_read(other, z + z_base + 8 * r * z_strides[1] + col0 * z_strides[3], int(z_strides[1]), int(z_strides[3]),
                rows - 8 * r, DZ - col0, at);
      sum = row_sum(tile_dot(product_tile, other));
      if (at.col == 0) writes[simdgroup * W + 8 * r + at.row] = sum;
    }
  }
  sync_threadgroup();

  stage<W, 8 * KZ>(ds, LDD, d + d_base, int(d_strides[1]), int(d_strides[3]), rows, DZ, thread_index, threads);
  stage<W, 8 * KZ>(zs, LDZ, z + z_base, int(z_strides[1]), int(z_strides[3]), rows, DZ, thread_index, threads);
  sync_threadgroup();
  HLA_UNROLL
  for (int n = 0; n < PAIRS; n++) {
    const int2 ij = triangle_block(simdgroup + n * NS);
    if (ij[0] < R) {
      Frag m = frag_zero();
      block_mma<KZ>(m, ds + 8 * ij[0] * LDD, LDD, zs + 8 * ij[1] * LDZ, LDZ, at);
      const int row = 8 * ij[0] + at.row, col = 8 * ij[1] + at.col;
      float2 pair = read * write * frag_get(m) * frag_get(pairs.f[n][0]);
      pair[0] = col < row ? pair[0] * decay_between(cum[row], cum[col], power) : 0.0f;
      pair[1] = col + 1 < row ? pair[1] * decay_between(cum[row], cum[col + 1], power) : 0.0f;
      if (ij[0] == ij[1]) {
        diagonal[8 * row + at.col] = pair[0];
        diagonal[8 * row + at.col + 1] = pair[1];
      }
      const float row_total = row_sum(pair[0] + pair[1]);
      const float2 col_total = float2(col_sum(pair[0]), col_sum(pair[1]));
      if (at.col == 0) by_row[row * R + ij[1]] = row_total;
      if (at.row == 0) {
        by_col[col * R + ij[0]] = col_total[0];
        by_col[(col + 1) * R + ij[0]] = col_total[1];
      }
    }
  }
  sync_threadgroup();
  // by_row[i][J] becomes a_i + the sum over the blocks before J; tails[j] the sum over the blocks below j's.
  for (int i = thread_index; i < W; i += threads) {
    float sum = 0.0f, c = 0.0f;
    for (int n = 0; n < NS; n++) {
      sum += reads[n * W + i];
      c += writes[n * W + i];
    }
    sum *= read * decay_since_start(cum[i], power);
    for (int block = 0; block <= i / 8; block++) {
      const float own = by_row[i * R + block];
      by_row[i * R + block] = sum;
      sum += own;
    }
    float tail = 0.0f;
    for (int block = i / 8 + 1; block < R; block++) tail += by_col[i * R + block];
    tails[i] = tail;
    writes[i] = c * decay_between(cum[W], cum[i], power);
  }
  sync_threadgroup();
  for (int t = thread_index; t < rows; t += threads) {
    const int block = t / 8;
    float sum = 0.0f;
    for (int n = 0; n < NS; n++) sum += wholes[n];
    sum *= decay_since_start(cum[W], power);
    for (int j = 0; j < t; j++) sum += writes[j];
    for (int j = 8 * block; j < t; j++) sum += tails[j];
    for (int i = t; i < W; i++) sum += by_row[i * R + block];
    for (int i = t; i < 8 * block + 8; i++) {
      for (int j = 8 * block; j < t; j++) sum += diagonal[8 * i + j % 8];
    }
    r[(long(batch) * total + t0 + t) * ho + head] = sum;
  }
