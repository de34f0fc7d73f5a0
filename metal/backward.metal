// Gradients of a pass LA_{g^p} (linear.metal) from the states at the borders of its blocks: two walks.
//
//     S_t = g_t^p S_{t-1} + y_t z_t^T      o_t = scale S_t^T x_t      d_t, the gradient of o_t
//     G_t = g_{t+1}^p G_{t+1} + scale x_t d_t^T                       the gradient of S_t
//
//     dx_t = scale S_t d_t     dy_t = G_t z_t     dz_t = G_t^T y_t     dg_t = p r_t / g_t
//
// r_t is the sum of all terms of <d, o> + <G_T, S_T> that hold the decay of token t. With S before a chunk, G
// after it, and D, b as in tiles.metal, M_ij = scale D_ij^p (x_i . y_j)(d_i . z_j) of its tokens:
//
//     r_t = sum_{i >= t > j} M_ij + sum_{i >= t} a_i + sum_{j < t} c_j + whole
//     a_i = scale b_i^p x_i^T S d_i    c_j = (b_end / b_j)^p y_j^T G z_j    whole = b_end^p <S, G>
//
// A decay of 0 counts as 1e-30 in the factors b and D of these terms, which the division takes out again; everywhere
// else it is an exact zero. So the dg of a token whose r_t goes through another zero is not 0 but 1e-30 of what it
// would be with a 1 there.
//
//     back_queries   forward in time with S: dx, and for the decay a and some of the states S   (grid NB x B Ho)
//     back_keys      backward in time with G: dy, dz and r                                       (grid NB x B Ho)
//
// `whole` wants both states, and the walks meet in memory only: S is kept every KEEP tokens of a block. What goes
// across a border is h = <S, G> there, all that holds the decay between two tokens; over a chunk
//
//     h_after = whole + sum_j c_j      h_before = whole + sum_i a_i
//
// so back_keys takes h from the S kept at the end of KEEP tokens and goes on from chunk to chunk. That subtracts, and
// leaves in the dg of a token a rounding error of h over its decay; the products that h is made of are EXACT. A chunk
// with a decay below SMALL subtracts nothing, and a tiny r_t keeps its digits: <S, G> is followed, for the G after the
// chunk, from the S kept before it, h = b_end^p h + sum_j c_j over every chunk between; or, where all its decays leave
// of <S, G> less than its rounding, whole is 0. With KEEP = W every chunk is followed, over none between.
//
// Both take the blocks of L tokens, in chunks of W. The forward has given S at the borders of the blocks, and
// linear_sums and linear_scan give G there. Heads and threads are as in linear.metal.
//
// Registers of a thread in tiles, at NC = 2: the state 4 K, and two tiles of a chunk, W / 2 each. D = 64: 32 + 32
// with W = 32; D = 96: 48 + 16 with W = 16; D = 128: 64 + 16. back_queries adds a third tile where PLUS. Above 96
// columns the two states of back_keys would take 512 threads, more than their registers allow (plan.REGISTERS), so
// two threadgroups of 256 divide a head's columns.
// Mirrors passes.gradients.
//# uses: adjoint

//# before each body
  const int block = launch.group.y, bh = launch.group.z;
  const int ho = d_shape[2], total = d_shape[1], batch = bh / ho, head = bh % ho;
  const float power = floats[0], scale = floats[1];
  const Walk walk = block_walk(block, ints[0], total);
  const long x_base = batch * x_strides[0] + (head * x_shape[2] / ho) * x_strides[2];
  const long y_base = batch * y_strides[0] + (head * y_shape[2] / ho) * y_strides[2];
  const long z_base = batch * z_strides[0] + (head * z_shape[2] / ho) * z_strides[2];
  const long d_base = batch * d_strides[0] + head * d_strides[2];
  const long g_base = batch * g_strides[0] + (head * g_shape[2] / ho) * g_strides[2];
  // Of the states S that a head keeps: those of a block, the first of this one, and of all with that after the end.
  const int of_block = (ints[0] + KEEP - 1) / KEEP, kept_first = block * of_block, blocks = launch.groups.y;
  const int of_head = (blocks - 1) * of_block + (total - (blocks - 1) * ints[0] + KEEP - 1) / KEEP + 1;
//# end

//# kernel back_queries
//# inputs: x y z d g entry plus ints floats
//# outputs: dx a kept
//
// x [B, T, Hx, DY], y, z, d [B, T, Ho, DZ], g: any strides. entry [B, Hs, NB, DY, DZ] float32, any strides: S
// entering each block. ints: L. floats: p, scale. dx [B, T, Ho, DY] in TO, plus `plus` of the same shape, any
// strides, where PLUS. DECAY: a [B, T, Ho] float32; kept [B, Hs, M, DZ, DY] float32: S^T every KEEP tokens of
// each block from its first on, and after the last token, by the first of the heads that share it. Without DECAY
// both have one element, zero.
// TX, TY, TZ, TD, TP, TO dtypes, DY, DZ widths, W chunk, KEEP a multiple of it, NC stripe; DECAY, PLUS; SAME.
// Threads: 32 per stripe of 8 NC columns of y.
// Threadgroup bytes: W (DZ' + pad) (sizeof(TD) + sizeof(TZ)) + 4 W (W + 4) + 4 W stripes + 16 W.
//# body
  constexpr int K = (DZ + 7) / 8, R = W / 8, LDD = 8 * K + 16 / sizeof(TD), LDZ = 8 * K + 16 / sizeof(TZ);
  constexpr int LDP = W + 16 / sizeof(Score), NS = (DY + 8 * NC - 1) / (8 * NC), KY = (DY + 7) / 8;
  constexpr int LDX = 8 * KY + 16 / sizeof(TX), LDY = 8 * KY + 16 / sizeof(TY), LDO = 8 * KY + 16 / sizeof(TP);
  constexpr int DZ_BYTES = W * (LDD * sizeof(TD) + LDZ * sizeof(TZ));
  constexpr int XY_BYTES = W * ((DECAY ? LDX * sizeof(TX) : 0) + (SAME ? 0 : LDY * sizeof(TY)));
  constexpr bool SELDOM = DECAY && KEEP > W, AHEAD = DZ_BYTES <= AHEAD_BYTES;
  constexpr bool STAGED = DZ_BYTES + XY_BYTES <= AHEAD_BYTES;
  constexpr bool ADDED = PLUS && DZ_BYTES + XY_BYTES + W * LDO * sizeof(TP) <= AHEAD_BYTES;  // `plus` staged, too
  constexpr int ROOMS = AHEAD ? 2 : 1;
  SHARED TD d_room[ROOMS * W * LDD];
  SHARED TZ z_room[ROOMS * W * LDZ];
  SHARED TX x_room[STAGED && DECAY ? 2 * W * LDX : 1];
  SHARED TY y_room[STAGED && !SAME ? 2 * W * LDY : 1];
  SHARED TP plus_room[ADDED ? 2 * W * LDO : 1];
  SHARED Score ps[W * LDP];
  SHARED float reads[NS * W];
  SHARED Decays<W> cums[ROOMS];
  SHARED Pair leasts[ROOMS * W];

  const int hs = entry_shape[1], shead = head * hs / ho, col0 = 8 * NC * launch.simdgroup;
  const bool keeps = DECAY && head % (ho / hs) == 0;
  const long slot = (long(batch) * hs + shead) * of_head + kept_first;
  const long plus_base = batch * plus_strides[0] + head * plus_strides[2];
  State<K, NC> state;  // S^T
  tile_read(state,
            entry + batch * entry_strides[0] + shead * entry_strides[1] + block * entry_strides[2] +
                col0 * entry_strides[3],
            int(entry_strides[4]), int(entry_strides[3]), DZ, DY - col0, at);
  for (int u = AHEAD ? -W : 0; u < walk.count; u += W) {
    if (AHEAD) sync_staged();
    const Turn turn = turn_of<AHEAD, W>(u);
    float decay = 1.0f;
    if (turn.first < walk.count) {
      const int rows = min(W, walk.count - turn.first), t = walk.first + turn.first, room = turn.next * W;
      stage<W, 8 * K>(d_room + room * LDD, LDD, d + d_base, d_strides, t, rows, DZ, launch);
      stage<W, 8 * K>(z_room + room * LDZ, LDZ, z + z_base, z_strides, t, rows, DZ, launch);
      if (STAGED && DECAY) stage<W, 8 * KY>(x_room + room * LDX, LDX, x + x_base, x_strides, t, rows, DY, launch);
      if (STAGED && !SAME) stage<W, 8 * KY>(y_room + room * LDY, LDY, y + y_base, y_strides, t, rows, DY, launch);
      if (ADDED) stage<W, 8 * KY>(plus_room + room * LDO, LDO, plus + plus_base, plus_strides, t, rows, DY, launch);
      decay = lane_decay(g + g_base + t * g_strides[1], g_strides[1], rows, launch);
    }
    if (!AHEAD) {
      stage_decays<DECAY, false>(cums[0], leasts, reads, decay, power, launch);
      sync_staged();
    }
    if (u >= 0) {
      const int rows = min(W, walk.count - u), t = walk.first + u, room = turn.now * W;
      IN_SHARED TD* ds = d_room + room * LDD;
      IN_SHARED TZ* zs = z_room + room * LDZ;
      IN_SHARED Decays<W>& cum = cums[turn.now];
      scores<K>(ps, LDP, ds, LDD, zs, LDZ, cum, power, scale, launch, at);
      Tile<R, NC> ys, out;
      tile_zero(out);
      tile_mma<R, K, NC, false, false, SELDOM>(out, ds, LDD, state, at);  // dX = scale b d S^T
      if (DECAY) {
        IN_SHARED float* dots = reads + launch.simdgroup * W;
        if (STAGED) {
          tile_dot_rows(dots, out, x_room + room * LDX + col0, LDX, 1, true, W, 8 * KY - col0, at);
        } else {
          const auto xs = x + x_base + t * x_strides[1] + col0 * x_strides[3];
          const int down = int(x_strides[1]), across = int(x_strides[3]);
          const bool runs = in_runs<2 * NC>(xs, down, across, DY - col0);
          tile_dot_rows(dots, out, xs, down, across, runs, rows, DY - col0, at);
        }
        if (keeps && u % KEEP == 0) {
          tile_write<float>(state, kept + (slot + u / KEEP) * (DY * DZ) + col0, DY, 1, DZ, DY - col0, at);
        }
      }
      tile_decay_from_start(out, cum, power, scale, at);
      if (SAME) {
        tile_take(ys, zs + col0, LDZ, 8 * K - col0, at);
      } else if (STAGED) {
        tile_take(ys, y_room + room * LDY + col0, LDY, 8 * KY - col0, at);
      } else {
        tile_read(ys, y + y_base + t * y_strides[1] + col0 * y_strides[3], int(y_strides[1]), int(y_strides[3]), rows,
                  DY - col0, at);
      }
      sync_threadgroup();
      tile_mma<R, R, NC, false, true>(out, ps, LDP, ys, at);  // dX += (D^p scale d z^T) Y
      if (ADDED) {
        tile_add(out, plus_room + room * LDO + col0, LDO, 8 * KY - col0, 1.0f, at);
      } else if (PLUS) {
        Tile<R, NC> more;
        tile_read(more, plus + plus_base + t * plus_strides[1] + col0 * plus_strides[3], int(plus_strides[1]),
                  int(plus_strides[3]), rows, DY - col0, at);
        tile_sum(out, more);
      }
      tile_write<TO>(out, dx + ((long(batch) * total + t) * ho + head) * DY + col0, ho * DY, 1, rows, DY - col0, at);
      pass_write(state, zs, LDZ, ys, cum, power, at);  // S^T = b_W S^T + Z^T (b_W / b) Y
      if (DECAY && launch.index < rows) {
        float sum = 0.0f;
        HLA_UNROLL
        for (int n = 0; n < NS; n++) sum += reads[n * W + launch.index];
        a[(long(batch) * total + t + launch.index) * ho + head] =
            scale * sum * decay_since_start(leasts[room + launch.index], power);
      }
    }
    if (AHEAD) {
      stage_decays<DECAY, false>(cums[turn.next], leasts + turn.next * W, reads, decay, power, launch);
    } else {
      sync_threadgroup();
    }
  }
  if (keeps && block == blocks - 1) {
    tile_write<float>(state, kept + (slot + (walk.count + KEEP - 1) / KEEP) * (DY * DZ) + col0, DY, 1, DZ, DY - col0,
                      at);
  }
  if (!DECAY && block == 0 && bh == 0 && launch.index == 0) {
    a[0] = 0.0f;
    kept[0] = 0.0f;
  }

//# kernel back_keys
//# inputs: x y z d g after a kept ints floats
//# outputs: dy dz r first
//
// x, y, z, d, g: as in back_queries, with its a and kept where DECAY. after [B, Ho, NB, DY, DZ] float32, any
// strides: G leaving each block at its end. ints: L. floats: p, scale.
// dy [B, T, Ho, DY] in TOY, dz [B, T, Ho, DZ] in TOZ; SAME: dy is the sum of both and dz one element, zero.
// r [B, T, Ho, HALVES] float32, in parts to be added (without DECAY one element, zero); first [B, Ho, DY, DZ]
// float32: G before the first token.
// TX, TY, TZ, TD, TOY, TOZ dtypes, DY, DZ widths, W chunk, KEEP as there, NC stripe, HALVES, DECAY; SAME: z is y,
// read once.
// Threads: 32 per stripe of 8 NC columns of the wider of dy and dz, for dz and as many for dy; HALVES = 2:
// half of them in each of two threadgroups, x of the grid.
// Threadgroup bytes: W (M' + pad) (sizeof(TX) + sizeof(TY) + sizeof(TZ) + sizeof(TD)), M' the wider of both,
// + 8 W (W + 4) + 16 W, and where DECAY 4 (W (W / 4 + 9 + NS) + NS + 2), NS the simdgroups of dz.
//# body
  constexpr int K = ((DY > DZ ? DY : DZ) + 7) / 8, R = W / 8, LDP = W + 16 / sizeof(Score);
  constexpr int NS = (K + NC * HALVES - 1) / (NC * HALVES);
  constexpr bool SELDOM = DECAY && KEEP > W;
  constexpr int LDX = 8 * K + 16 / sizeof(TX), LDY = 8 * K + 16 / sizeof(TY);
  constexpr int LDD = 8 * K + 16 / sizeof(TD), LDZ = 8 * K + 16 / sizeof(TZ), LDS = 8 * K + 4;
  constexpr int XD_BYTES = W * (LDX * sizeof(TX) + LDD * sizeof(TD)), Y_BYTES = W * LDY * sizeof(TY);
  constexpr int YZ_BYTES = Y_BYTES + (SAME ? 0 : W * LDZ * int(sizeof(TZ))), MORE = W * LDP * (2 * sizeof(Score) - 4);
  constexpr bool AHEAD = XD_BYTES + YZ_BYTES + MORE <= AHEAD_BYTES;  // MORE: what scores have beyond those of halves
  constexpr int ROOMS = AHEAD ? 2 : 1;
  SHARED float xd_room[ROOMS * XD_BYTES / 4];
  SHARED TY y_room[ROOMS * W * LDY];
  SHARED TZ z_room[SAME ? 1 : ROOMS * W * LDZ];
  SHARED Score ps[W * LDP], ms[W * LDP];
  SHARED Decays<W> cums[ROOMS];
  SHARED Pair leasts[ROOMS * W];
  SHARED Parts<DECAY ? W : 8> parts;
  SHARED float tails[DECAY ? W : 1], writes[DECAY ? NS * W : 1], crossing[DECAY ? NS : 1], past[ROOMS], whole[1];

  const bool of_y = launch.simdgroup >= NS;  // dy's columns and the transpose of G, or dz's and G
  const int part = launch.group.x, hs = max(int(y_shape[2]), int(z_shape[2]));
  const int stripe = launch.simdgroup % NS, col0 = 8 * NC * (stripe + NS * part), width = of_y ? DY : DZ;
  const float own = part == 0 ? scale : 0.0f;

  State<K, NC> state;
  const int down = of_y ? after_strides[4] : after_strides[3], across = of_y ? after_strides[3] : after_strides[4];
  tile_read(state,
            after + batch * after_strides[0] + head * after_strides[1] + block * after_strides[2] + col0 * across, down,
            across, of_y ? DZ : DY, width - col0, at);
  float flow = 0.0f, coming = 0.0f;  // h, and a of the chunk that is next, in the first simdgroup
  for (int u = (walk.count - 1) / W * W + (AHEAD ? W : 0); u >= 0; u -= W) {
    if (AHEAD) sync_staged();
    const int w = AHEAD ? u - W : u, next = AHEAD ? w / W & 1 : 0, now = AHEAD ? 1 - next : 0;  // chunk w is next
    IN_SHARED TX* xs = reinterpret_cast<IN_SHARED TX*>(xd_room + next * (XD_BYTES / 4));
    float read = coming, decay = 1.0f;
    if (w >= 0) {
      const int rows = min(W, walk.count - w), t = walk.first + w, room = next * W;
      stage<W, 8 * K>(xs, LDX, x + x_base, x_strides, t, rows, DY, launch);
      stage<W, 8 * K>(reinterpret_cast<IN_SHARED TD*>(xs + W * LDX), LDD, d + d_base, d_strides, t, rows, DZ, launch);
      stage<W, 8 * K>(y_room + room * LDY, LDY, y + y_base, y_strides, t, rows, DY, launch);
      if (!SAME) stage<W, 8 * K>(z_room + room * LDZ, LDZ, z + z_base, z_strides, t, rows, DZ, launch);
      decay = lane_decay(g + g_base + t * g_strides[1], g_strides[1], rows, launch);
      if (DECAY && part == 0 && launch.simdgroup == 0) {
        coming = launch.lane < rows ? a[(long(batch) * total + t + launch.lane) * ho + head] : 0.0f;
      }
    }
    if (!AHEAD) {
      read = coming;
      stage_decays<DECAY, SELDOM>(cums[0], leasts, past, decay, power, launch);
      sync_staged();
    }
    if (u < walk.count) {
      const int rows = min(W, walk.count - u), t = walk.first + u;
      xs = reinterpret_cast<IN_SHARED TX*>(xd_room + now * (XD_BYTES / 4));
      IN_SHARED TD* ds = reinterpret_cast<IN_SHARED TD*>(xs + W * LDX);
      IN_SHARED TY* ys = y_room + now * (W * LDY);
      IN_SHARED TZ* zs = SAME ? reinterpret_cast<IN_SHARED TZ*>(ys) : z_room + now * (W * LDZ);
      IN_SHARED Decays<W>& cum = cums[now];
      IN_SHARED Pair* least = leasts + now * W;
      Tile<R, NC> out;
      bool met = false, exact = false, none = false;  // S in memory; whether it must be; whether whole is 0
      if (DECAY) {
        exact = !SELDOM || (past[now] <= 1.0f && past[now] > NOTHING);
        none = SELDOM && past[now] <= NOTHING;
        met = exact || (u + W) % KEEP == 0 || u + W >= walk.count;
        if (met && of_y) {
          const long slot = (long(batch) * hs + head * hs / ho) * of_head + kept_first + u / KEEP + (exact ? 0 : 1);
          const float sum = lanes_sum(tile_dot(state, kept + slot * (DY * DZ) + col0, DY, 1, DZ, DY - col0, at));
          if (launch.lane == 0) crossing[stripe] = sum;
        }
      }
      if (SELDOM && exact && u % KEEP > 0) {  // h = b_W h + sum (b_W / b) y^T G z, over the chunks from S on
        sync_staged();
        flow = 0.0f;
        for (int n = 0; n < NS; n++) flow += crossing[n];
        met = false;
        for (int v = u / KEEP * KEEP; v <= u; v += W) {  // in the room of chunk w, which comes again after them
          const int c = v < u ? v : w, rows = min(W, walk.count - c), t = walk.first + c, room = next * W;
          IN_SHARED TY* yv = y_room + room * LDY;
          IN_SHARED TZ* zv = SAME ? reinterpret_cast<IN_SHARED TZ*>(yv) : z_room + room * LDZ;
          if (c >= 0) stage<W, 8 * K>(yv, LDY, y + y_base, y_strides, t, rows, DY, launch);
          if (c >= 0 && !SAME) stage<W, 8 * K>(zv, LDZ, z + z_base, z_strides, t, rows, DZ, launch);
          if (v == u) break;
          stage_decay(cums[next], lane_decay(g + g_base + t * g_strides[1], g_strides[1], rows, launch), power, launch);
          sync_staged();
          if (!of_y) {
            tile_zero(out);
            tile_mma<R, K, NC, false, false, SELDOM>(out, yv, LDY, state, at);
            tile_dot_rows(writes + stripe * W, out, zv + col0, LDZ, 1, true, W, 8 * K - col0, at);
          }
          sync_threadgroup();
          if (launch.simdgroup == 0) {
            IN_SHARED Decays<W>& cum = cums[next];
            float sum = 0.0f;
            for (int n = 0; n < NS && launch.lane < W; n++) sum += writes[n * W + launch.lane];
            if (launch.lane < W) sum *= decay_between(cum.sums[W - 1], cum.sums[launch.lane], power);
            flow = flow * chunk_decay(cum, power) + lanes_sum(sum);
          }
          sync_threadgroup();
        }
        if (!AHEAD) {
          stage_decay(cums[0], decay, power, launch);
          sync_staged();
        }
      }
      two_scores<K, DECAY>(
          ps, ms, LDP, xs, LDX, ys, LDY, ds, LDD, zs, LDZ, cum, least, parts, power, scale, own, launch, at);
      // dY = (b_W / b) Z G^T, or dZ = (b_W / b) Y G
      read_back_either<SELDOM>(of_y, out, state, ys, LDY, zs, LDZ, at);
      if (DECAY && !of_y) tile_dot_rows(writes + stripe * W, out, zs + col0, LDZ, 1, true, W, 8 * K - col0, at);
      sync_threadgroup();
      // dY += ms^T X and G^T = b_W G^T + scale D^T b X, or dZ += ps^T D and G = b_W G + scale X^T b D
      step_back_either(of_y, out, state, ps, ms, LDP, xs, LDX, ds, LDD, col0, cum, power, scale, at);
      const long token = (long(batch) * total + t) * ho + head;
      if (!SAME) {
        if (of_y) {
          tile_write<TOY>(out, dy + token * DY + col0, ho * DY, 1, rows, DY - col0, at);
        } else {
          tile_write<TOZ>(out, dz + token * DZ + col0, ho * DZ, 1, rows, DZ - col0, at);
        }
      }
      if (DECAY && launch.simdgroup == 0) {
        const int i = launch.lane;
        float write = 0.0f;
        if (i < W) {
          HLA_UNROLL
          for (int n = 0; n < NS; n++) write += writes[n * W + i];
          tails[i] = parts_gather<W>(parts, i, read);
          write *= decay_between(least[W - 1], least[i], power);
          writes[i] = write;
        }
        const float writes_sum = lanes_sum(write), reads_sum = lanes_sum(read);
        if (met) {
          flow = 0.0f;
          for (int n = 0; n < NS; n++) flow += crossing[n];
        }
        flow = exact ? flow * decay_since_start(least[W - 1], power) : none ? 0.0f : flow - writes_sum;
        if (i == 0) whole[0] = flow;
        flow += reads_sum;  // h before the chunk
      }
      sync_threadgroup();
      if (SAME) {  // the tiles are done with: their room takes dz's part over to dy's simdgroups
        IN_SHARED float* other = xd_room + now * (XD_BYTES / 4) + col0;
        if (!of_y) tile_put(out, other, LDS, 8 * K - col0, at);
        sync_threadgroup();
        if (of_y) {
          tile_add(out, other, LDS, 8 * K - col0, 1.0f, at);
          tile_write<TOY>(out, dy + token * DY + col0, ho * DY, 1, rows, DY - col0, at);
        }
      }
      if (DECAY) {  // eight lanes share a token's sums
        for (int i = launch.index / 8; i - launch.index / 8 < rows; i += launch.threads / 8) {
          const float sum = i < rows ? parts_sum<W>(parts, writes, tails, i, launch.index % 8) : 0.0f;
          const float all = whole[0] + eight_sum(sum);
          if (launch.index % 8 == 0 && i < rows) r[(token + i * ho) * HALVES + part] = all;
        }
      }
      if (SAME && !AHEAD) sync_threadgroup();
    }
    if (AHEAD) stage_decays<DECAY, SELDOM>(cums[next], leasts + next * W, past + next, decay, power, launch);
  }
  if (block == 0 && !of_y) {
    tile_write<float>(state, first + (long(batch) * ho + head) * (DY * DZ) + col0, DZ, 1, DY, DZ - col0, at);
  }
  if (block == 0 && bh == 0 && part == 0 && launch.index == 0) {
    if (SAME) dz[0] = static_cast<TOZ>(0.0f);
    if (!DECAY) r[0] = 0.0f;
  }
