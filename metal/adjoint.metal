// What the walk back over keys and values is made of, besides dots.metal: decays in both forms, and the products of
// half its simdgroups, which make dy, and of the other half, which make dz. No kernels.
//# uses: linear dots

CONSTANT float LOG_TINY = -99.657843f, SMALL = 0.25f, NOTHING = 1.0f / 16777216;

// stage_decay with a decay of 0 as exact zero and, where its gradient is wanted, as 1e-30 too; where SELDOM, past = a
// bound of b_end^p over any of the decays below SMALL, 2 where none is.
template <bool DECAY, bool SELDOM, int W>
FUNC void stage_decays(
    IN_SHARED Decays<W>& cum, IN_SHARED Pair* least, IN_SHARED float* past, float decay, float power, Launch launch) {
  stage_decay(cum, decay, power, launch);
  if (DECAY && launch.simdgroup == 0) {
    const Pair sum = decay_sum(decay, LOG_TINY);
    if (launch.lane < W) least[launch.lane] = sum;
    if (SELDOM) {
      const float count = lanes_sum(decay < SMALL ? 1.0f : 0.0f);
      const float most = exp_two(power * lanes_sum(log_two(decay < SMALL ? SMALL : decay))) / SMALL;
      if (launch.lane == 0) *past = count > 0.0f ? most : 2.0f;
    }
  }
}

// The rest of one gradient's columns of a chunk, out = (b_end / b)^p out + P^T right, where out holds what G at the
// chunk's end gives; then G at its start: state = b_end^p state + scale U^T b^p right.
template <int K, int R, int NC, typename PU, typename PR>
FUNC void step_back(
    OWN Tile<R, NC>& out, OWN State<K, NC>& state, IN_SHARED const Score* p, int ldp, PU u, int ldu, PR right,
    int ldr, int cols, IN_SHARED const Decays<8 * R>& cum, float power, float scale, Spot at) {
  tile_decay_to_end(out, cum, power, at);
  Tile<R, NC> r;
  tile_take(r, right, ldr, cols, at);
  tile_mma<R, R, NC, true, true>(out, p, ldp, r, at);  // out += P^T right
  tile_decay_from_start(r, cum, power, scale, at);
  tile_scale(state, chunk_decay(cum, power));
  tile_mma<K, R, NC, true, false>(state, u, ldu, r, at);
}

// The same for the half that it is, `second` or not: P, U and right are ms, d and x, or ps, x and d. Where these are of
// one type both halves have one text, so that a core has less of it to fetch.
template <int K, int R, int NC, typename T>
FUNC void step_back_either(
    bool second, OWN Tile<R, NC>& out, OWN State<K, NC>& state, IN_SHARED const Score* ps, IN_SHARED const Score* ms,
    int ldp, IN_SHARED T* x, int ldx, IN_SHARED T* d, int, int col0, IN_SHARED const Decays<8 * R>& cum, float power,
    float scale, Spot at) {
  step_back(out, state, second ? ms : ps, ldp, second ? d : x, ldx, (second ? x : d) + col0, ldx, 8 * K - col0, cum,
            power, scale, at);
}

template <int K, int R, int NC, typename TX, typename TD>
FUNC void step_back_either(
    bool second, OWN Tile<R, NC>& out, OWN State<K, NC>& state, IN_SHARED const Score* ps, IN_SHARED const Score* ms,
    int ldp, IN_SHARED TX* x, int ldx, IN_SHARED TD* d, int ldd, int col0, IN_SHARED const Decays<8 * R>& cum,
    float power, float scale, Spot at) {
  if (second) {
    step_back(out, state, ms, ldp, d, ldd, x + col0, ldx, 8 * K - col0, cum, power, scale, at);
  } else {
    step_back(out, state, ps, ldp, x, ldx, d + col0, ldd, 8 * K - col0, cum, power, scale, at);
  }
}

// out = what G at the chunk's end gives of dY or dZ, less b_end / b: Z G^T, if `second`, or Y G, which is EXACT.
template <bool EXACT, int K, int R, int NC, typename T>
FUNC void read_back_either(
    bool second, OWN Tile<R, NC>& out, OWN State<K, NC>& state, IN_SHARED T* y, int ldy, IN_SHARED T* z, int, Spot at) {
  tile_zero(out);
  tile_mma<R, K, NC, false, false, EXACT>(out, second ? z : y, ldy, state, at);
}

template <bool EXACT, int K, int R, int NC, typename TY, typename TZ>
FUNC void read_back_either(
    bool second, OWN Tile<R, NC>& out, OWN State<K, NC>& state, IN_SHARED TY* y, int ldy, IN_SHARED TZ* z, int ldz,
    Spot at) {
  tile_zero(out);
  if (second) {
    tile_mma<R, K, NC, false, false>(out, z, ldz, state, at);
  } else {
    tile_mma<R, K, NC, false, false, EXACT>(out, y, ldy, state, at);
  }
}
