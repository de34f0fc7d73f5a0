"""The stand-in's machine: simdgroups, matrices, types, launches, inputs and outputs, schedules, counters."""

import mlx.core as mx
import numpy as np
import pytest
from standin import build, metal

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

LANES = np.arange(32)
X = np.random.default_rng(1).standard_normal(64).astype(np.float32)
ROWS = X.reshape(2, 32)


def run(source, *, header="", inputs=None, shape=(64,), dtype=mx.float32, grid=64, threadgroup=64, **rest):
    inputs = {"x": mx.array(X)} if inputs is None else inputs
    contiguous = rest.pop("contiguous", True)
    kernel = metal.metal_kernel("t", list(inputs), ["y"], source, header, ensure_row_contiguous=contiguous)
    y = kernel(
        inputs=list(inputs.values()), grid=(grid, 1, 1), threadgroup=(threadgroup, 1, 1),
        output_shapes=[shape], output_dtypes=[dtype], **rest,
    )[0]  # fmt: skip
    return np.array(y.astype(mx.float32)) if dtype == mx.bfloat16 else np.array(y)


def each(expression, kind="float", **rest):
    """y[i] = expression of this lane's value v and lane l."""
    return run(
        f"uint i = thread_position_in_grid.x; ushort l = thread_index_in_simdgroup; {kind} v = ({kind})x[i];"
        f"y[i] = (float)({expression}) + 0 * l;",
        **rest,
    )


def same(values):
    return np.repeat(values, 32)


SIMD = {
    "simd_sum(v)": same(ROWS.sum(1)),
    "simd_product(v)": same(ROWS.prod(1)),
    "simd_max(v)": same(ROWS.max(1)),
    "simd_min(v)": same(ROWS.min(1)),
    "simd_prefix_inclusive_sum(v)": ROWS.cumsum(1),
    "simd_prefix_exclusive_sum(v)": ROWS.cumsum(1) - ROWS,
    "simd_prefix_inclusive_product(v)": ROWS.cumprod(1),
    "simd_broadcast(v, 7)": same(ROWS[:, 7]),
    "simd_broadcast_first(v)": same(ROWS[:, 0]),
    "simd_shuffle(v, (ushort)(31 - l))": ROWS[:, ::-1],
    "simd_shuffle_xor(v, 5)": ROWS[:, LANES ^ 5],
    "simd_shuffle_up(v, 3)": np.concatenate([ROWS[:, :3], ROWS[:, :29]], 1),
    "simd_shuffle_down(v, 3)": np.concatenate([ROWS[:, 3:], ROWS[:, 29:]], 1),
    "simd_shuffle_rotate_up(v, 3)": np.roll(ROWS, 3, 1),
    "simd_shuffle_rotate_down(v, 3)": np.roll(ROWS, -3, 1),
    "simd_shuffle_and_fill_up(v, -v, 3)": np.concatenate([-ROWS[:, 29:], ROWS[:, :29]], 1),
    "simd_shuffle_and_fill_down(v, -v, 3)": np.concatenate([ROWS[:, 3:], -ROWS[:, :3]], 1),
    "simd_all(v > -5)": np.ones(64),
    "simd_any(v > 2)": same((ROWS > 2).any(1)),
    "popcount((uint)(simd_vote::vote_t)simd_ballot(v > 0))": same((ROWS > 0).sum(1)),
    "simd_sum((uint)l)": np.full(64, 496),
    "simd_xor((uint)l)": np.zeros(64),
    "quad_broadcast(v, 2)": np.repeat(X.reshape(-1, 4)[:, 2], 4),
    "simd_shuffle(float4(v), (ushort)9).y": same(ROWS[:, 9]),
}


@pytest.mark.parametrize("expression", SIMD)
def test_simdgroup_function(expression):
    np.testing.assert_allclose(each(expression), np.ravel(SIMD[expression]), rtol=1e-5, atol=1e-6)


def test_partial_simdgroup():
    got = each("simd_sum(1.0f)", inputs={"x": mx.array(X[:48])}, grid=48, threadgroup=48, shape=(48,))
    np.testing.assert_array_equal(got, [32] * 32 + [16] * 16)


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("dot(float4(float2(v, 1.0f), 2, v).wzyx, float4(1, 0, 0, 1))", 2 * X),
        ("float3(v).zyx.x + as_type<float>(as_type<uint>(v))", 2 * X),
        ("metal::exp(v) + fast::log(abs(v)) + precise::tanh(v)", np.exp(X) + np.log(np.abs(X)) + np.tanh(X)),
        ("select(0.0f, v, v > 0)", np.maximum(X, 0)),
        ("clamp(v, -0.5f, 0.5f) + max(v, 0.0f)", np.clip(X, -0.5, 0.5) + np.maximum(X, 0)),
        ("fma(v, v, 1.0f) * 2.0", 2 * (X * X + 1)),
        ("(half)v * (half)v + (half)v", (X.astype("f2") * X.astype("f2") + X.astype("f2")).astype("f4")),
        ("ceildiv(7, 2) + (is_same_v<float, half> ? 1 : 0)", np.full(64, 4)),
        ("numeric_limits<float>::max() > 1e38f && isinf(-INFINITY)", np.ones(64)),
    ],
)
def test_language(expression, want):
    np.testing.assert_allclose(each(expression), want, rtol=2e-6, atol=1e-6)


def test_bfloat_rounds_after_every_operation():
    x = mx.array(X).astype(mx.bfloat16)
    got = run(
        "uint i = thread_position_in_grid.x; y[i] = x[i] * x[i] + x[i];", inputs={"x": x}, dtype=mx.bfloat16
    )
    np.testing.assert_array_equal(got, np.array((x * x + x).astype(mx.float32)))


def test_threadgroup_declarations_and_structs():
    got = run(
        """threadgroup float A[4][32], B[128]; threadgroup T C [ 2 ] [64]; threadgroup bool flag;
        threadgroup float4 V[16];
        uint t = thread_index_in_threadgroup;
        if (t == 0) flag = true;
        A[t / 32][t % 32] = x[t]; B[127 - t] = x[t]; C[t / 32][t % 32] = 2 * x[t];
        if (t < 16) V[t] = float4(x[t], x[t + 16], x[t + 32], x[t + 48]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup float* p = &B[0]; threadgroup const float4* vp = V;
        Tile<T> tile{p + 64}; float last; tile.get(63 - t, last); bump(last);
        y[t] = A[t / 32][t % 32] + p[127 - t] + C[t / 32][t % 32] + vp[t % 16][t / 16]
          + last * LUT[1] + (flag ? 0 : 1);""",
        header="""constant float LUT[2] = {1, 2};
        template <typename T> struct Tile {
          threadgroup T* s;
          void get(uint i, thread T& o) const { o = s[i]; }
        };
        inline void bump(thread float& a) { a += 1; }""",
        template=[("T", mx.float32)],
    )  # fmt: skip
    np.testing.assert_allclose(got, 7 * X + 2, rtol=1e-5, atol=1e-5)


def test_a_word_of_ones_own_for_threadgroup():
    """A source may define one; its arrays are watched like any others."""
    header = "#define SHARED threadgroup\nstatic float first(SHARED const float* p) { return p[0]; }"
    body = "SHARED float a[2], b; a[0] = a[1] = b = 3; y[0] = first({});"
    options = {"header": header, "shape": (1,), "grid": 1, "threadgroup": 1}
    assert run(body.format("a"), **options) == 3
    with metal.counters() as c:
        assert run(body.format("&b"), **options) == 3
    assert c.threadgroup_bytes == 12
    with pytest.raises(metal.MetalError, match="out of the bounds"):
        run(body.format("a + 3"), **options)


def test_a_narrower_view_of_a_threadgroup_array():
    got = run("""threadgroup float S[64]; threadgroup half* h = (threadgroup half*)S;
        uint t = thread_index_in_threadgroup; S[t] = 0; threadgroup_barrier(mem_flags::mem_threadgroup);
        h[2 * t] = (half)t; h[2 * t + 1] = (half)1; y[t] = h[2 * t] + h[2 * t + 1];""")
    np.testing.assert_array_equal(got, np.arange(64) + 1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
def test_matrix_lanes_strides_and_transposes(dtype):
    a = mx.array(np.random.default_rng(2).standard_normal((24, 20)), dtype)
    got = run(
        """simdgroup_matrix<T, 8, 8> m, n; simdgroup_float8x8 one(1.0f), z;
        simdgroup_load(m, a, 20, ulong2(4, 8)); simdgroup_load(n, a + 2, 20, ulong2(0, 0), true);
        simdgroup_multiply(z, m, n); simdgroup_multiply_accumulate(z, one, one, z);
        ushort l = thread_index_in_simdgroup, r = (l / 4 & 4) + l / 2 % 4, c = (l / 4 & 2) * 2 + l % 2 * 2;
        z.thread_elements()[0] += r; z.thread_elements()[1] += c + 1;
        simdgroup_store(z, y, 9, ulong2(1, 0)); if (l < 8) y[l * 9] = 0;
        simdgroup_store(z, y + 72, 8, ulong2(0, 0), true);""",
        inputs={"a": a}, grid=32, threadgroup=32, shape=(136,), template=[("T", dtype)],
    )  # fmt: skip
    a = np.array(a.astype(mx.float32))
    want = a[8:16, 4:12] @ a[:8, 2:10].T + np.eye(8)
    want[:, 0::2] += np.arange(8)[:, None]
    want[:, 1::2] += np.arange(1, 8, 2)
    np.testing.assert_allclose(got[:72].reshape(8, 9)[:, 1:], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[72:].reshape(8, 8), want.T, rtol=1e-5, atol=1e-5)


def test_grid_that_the_threadgroup_does_not_divide():
    got = run(
        "y[thread_position_in_grid.x] = threads_per_threadgroup.x + 1000 * threadgroup_position_in_grid.x"
        " + 10 * (x_ndim + simdgroups_per_threadgroup) + 0 * threads_per_grid.y + 0 * x[0];",
        grid=64, threadgroup=48, dtype=mx.int32,
    )  # fmt: skip
    np.testing.assert_array_equal(got, [48 + 30] * 48 + [16 + 1000 + 20] * 16)


VIEWS = {
    "whole": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "sliced": lambda a: a[1:, ::2, 3:],
    "reversed": lambda a: a[:, ::-1, ::-2],
    "broadcast": lambda a: mx.broadcast_to(a[:, :1], (4, 6, 10)),
}


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8], ids=["f32", "bf16", "i8"])
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_are_views(view, dtype, contiguous):
    a = VIEWS[view]((mx.arange(240) - 120).reshape(4, 6, 10).astype(dtype))
    with metal.counters() as c:
        got = run(
            """uint i = thread_position_in_grid.x; uint d2 = a_shape[2], d1 = a_shape[1];
            y[i] = (float)a[elem_to_loc(i, a_shape, a_strides, a_ndim)] + (float)d1 * 0 * d2;""",
            inputs={"a": a}, grid=a.size, threadgroup=min(a.size, 128), shape=a.shape, contiguous=contiguous,
        )  # fmt: skip
    np.testing.assert_array_equal(got, np.array(a.astype(mx.float32)))
    assert c.copies == (contiguous and view != "whole")


def test_what_lies_between_a_views_elements_is_poison():
    a = mx.zeros((8, 16))[:, ::2]
    got = run(
        "y[thread_position_in_grid.x] = a[1];",
        inputs={"a": a},
        grid=1,
        threadgroup=1,
        shape=(1,),
        contiguous=False,
    )
    assert np.isnan(got).all()


def test_small_inputs_and_scalars():
    got = run(
        "y[thread_position_in_grid.x] = a[0] * s + (b ? n : 0);",
        inputs={"a": mx.array([2.0, 3.0]), "s": 4.0, "b": True, "n": 5}, grid=4, threadgroup=4, shape=(4,),
    )  # fmt: skip
    np.testing.assert_array_equal(got, [13] * 4)


def test_init_value_and_unwritten_outputs():
    source = "uint i = thread_position_in_grid.x; if (i != 3) y[i] = 1;"
    np.testing.assert_array_equal(run(source, init_value=7)[2:5], [1, 7, 1])
    for checked in (True, False):
        with (
            metal.options(checked=checked),
            pytest.raises(metal.MetalError, match="1 elements never written"),
        ):
            run(source)


def test_gradient_of_a_bare_kernel_is_refused_and_a_custom_function_works(monkeypatch):
    metal.install(monkeypatch)
    kernel = mx.fast.metal_kernel(
        name="square", input_names=["x"], output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i] * x[i];",
    )  # fmt: skip

    def raw(x):
        return kernel(inputs=[x], grid=(x.size, 1, 1), threadgroup=(8, 1, 1), output_shapes=[x.shape],
                      output_dtypes=[x.dtype])[0]  # fmt: skip

    @mx.custom_function
    def square(x):
        return raw(x)

    @square.vjp
    def _(x, cotangent, _out):
        return 2 * x * cotangent * raw(mx.ones_like(x))

    x = mx.arange(8).astype(mx.float32)
    with pytest.raises(ValueError, match="Not implemented"):
        mx.grad(lambda x: raw(x).sum())(x)
    loss = lambda x: (square(square(x) + 1) * x).sum()  # noqa: E731
    want = mx.grad(lambda x: (((x * x + 1) ** 2) * x).sum())(x)
    for f in (loss, mx.checkpoint(loss), mx.compile(loss)):
        assert mx.allclose(mx.grad(f)(x), want)


def test_a_traced_call_is_refused():
    f = lambda x: metal.metal_kernel("t", ["x"], ["y"], "y[thread_position_in_grid.x] = x[0];")(  # noqa: E731
        inputs=[x], grid=(8, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(8,)], output_dtypes=[mx.float32]
    )[0]
    for traced in (mx.compile(f), mx.vmap(f)):
        with pytest.raises(metal.MetalError, match="needs values"):
            traced(mx.zeros((2, 8)))


def test_uninitialised_private_variables_are_poison():
    assert np.isnan(run("float z[2]; y[thread_position_in_grid.x] = z[thread_position_in_grid.x % 2];")).all()


@pytest.mark.parametrize("schedule", metal.SCHEDULES)
def test_schedules_differ_and_repeat(schedule):
    """A racy kernel, unwatched, tells the schedules apart; the same schedule gives the same again."""
    source = """threadgroup uint turn[1]; if (thread_index_in_threadgroup == 0) turn[0] = 0;
        threadgroup_barrier(mem_flags::mem_threadgroup); uint order = 0;
        for (int k = 0; k < 3; k++) { order = order * 64 + turn[0]; turn[0] = turn[0] + 1; simd_sum(1.0f); }
        y[thread_index_in_threadgroup] = order;"""
    seen = {}
    for other in metal.SCHEDULES:
        with metal.options(checked=False, schedule=other, seed=2):
            seen[other] = [run(source, dtype=mx.uint32, inputs={}).tobytes() for _ in range(2)]
    assert seen[schedule][0] == seen[schedule][1]
    assert all(seen[other][0] != seen[schedule][0] for other in metal.SCHEDULES if other != schedule)


def test_counters():
    with metal.counters() as c:
        run(
            """uint t = thread_index_in_threadgroup; threadgroup float S[64]; S[t] = x[t] + x[0];
            threadgroup_barrier(mem_flags::mem_threadgroup); simdgroup_barrier(mem_flags::mem_none);
            float z = S[t ^ 1] * S[t]; simdgroup_float8x8 m; simdgroup_load(m, x, 8);
            simdgroup_multiply(m, m, m);
            y[thread_position_in_grid.x] = simd_sum(z) + m.thread_elements()[0];""",
            grid=128, shape=(128,),
        )  # fmt: skip
    assert (c.launches, c.threadgroups, c.threads, c.kernels) == (1, 2, 128, ["t"])
    assert c.read == {"x": 2 * (64 * 4 + 64 * 4 + 2 * 256)}
    assert c.unique_read == {"x": 2 * 256}
    assert c.written == c.unique_written == {"y": 512}
    assert (c.threadgroup_bytes, c.threadgroup_written, c.threadgroup_read) == (256, 512, 1024)
    # Every thread loads x[t] and x[0] and two of S; a matrix comes in rows.
    assert (c.device_loads, c.device_stores) == (2 * 128 + 4 * 8, 128)
    assert (c.threadgroup_loads, c.threadgroup_stores) == (2 * 128, 128)
    assert (c.matrix_multiplies, c.matrix_macs, c.scalar_macs) == (4, 2048, 128)
    assert (c.barriers, c.simdgroup_barriers, c.simd_ops) == (2, 4, 4)
    with metal.counters() as inner:
        run("y[thread_position_in_grid.x] = x[0];")
        run("y[thread_position_in_grid.x] = x[1];", grid=64, threadgroup=32)
    assert c.launches == 1
    assert [one.threadgroups for one in inner.each] == [1, 2]
    assert [one.written for one in inner.each] == [{"y": 256}] * 2


@pytest.mark.parametrize(("sums", "in_flight"), [(1, (8 + 29) / 30), (3, (3 * 8 + 27 * 3) / 30), (10, 8)])
def test_accumulators_in_flight(sums, in_flight):
    with metal.counters() as c:
        run(
            f"""simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), m[{sums}];
            for (int i = 0; i < {sums}; i++) m[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            for (int i = 0; i < 30; i++) {{
              simdgroup_multiply_accumulate(m[i % {sums}], a, a, m[i % {sums}]);
            }}
            y[thread_position_in_grid.x] = m[0].thread_elements()[0];""",
            grid=32, threadgroup=32, shape=(32,),
        )  # fmt: skip
    assert c.matrix_multiplies == 30
    assert c.in_flight == pytest.approx(in_flight)


def test_options_are_checked_and_undone():
    with pytest.raises(ValueError, match="schedule must be one of"), metal.options(schedule="backwards"):
        pass
    with pytest.raises(TypeError), metal.options(speed=2):
        pass
    source = "y[0] = thread_position_in_grid.x / 64;"
    np.testing.assert_array_equal(run(source, shape=(1,)), [0])  # 64 writes of one value
    with metal.options(strict_writes=True), pytest.raises(metal.MetalError, match="write after write"):
        run(source, shape=(1,))
    early = "uint i = thread_position_in_grid.x; y[i] = 0; if (i % 32 > 3) return; y[i] = simd_sum(1.0f);"
    with pytest.raises(metal.MetalError, match="divergent simdgroup"):
        run(early)
    with metal.options(early_exit=True):
        assert run(early).sum() == 2 * 4 * 4


def test_a_crash_is_an_error_and_the_next_launch_runs():
    wild = "*(device float*)(ulong)thread_position_in_grid.x = 1; y[thread_position_in_grid.x] = x[0];"
    with (
        metal.options(checked=False),
        pytest.raises(metal.MetalError, match="killed its process: memory fault"),
    ):
        run(wild)
    with pytest.raises(metal.MetalError, match="belongs to no buffer"):
        run(wild)
    np.testing.assert_array_equal(each("v"), X)


def test_messages_name_the_thread_and_the_line():
    with pytest.raises(metal.MetalError) as e:
        run("uint i = thread_position_in_grid.x;\nfloat v = x[i + 1];\ny[i] = v;")
    text = str(e.value)
    assert "thread (63, 0, 0), simdgroup 1, lane 31" in text
    assert "float v = x[i + 1];" in text


def test_atomics_are_refused():
    with pytest.raises(metal.MetalError, match="atomic outputs"):
        metal.metal_kernel("t", ["x"], ["y"], "", atomic_outputs=True)


def test_compiled_kernels_are_kept(tmp_path, monkeypatch):
    made = []
    real = build._run
    monkeypatch.setattr(build, "_run", lambda *a: made.append(a) or real(*a))
    source = f"y[thread_position_in_grid.x] = {np.random.default_rng().integers(1 << 30)};"
    run(source)
    first = len(made)
    run(source)
    assert first > 0
    assert len(made) == first
