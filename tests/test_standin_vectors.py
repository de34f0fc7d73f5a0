"""Vectors of a threadgroup's array on the stand-in for Metal: one access each, aligned, all of it inside."""

import numpy as np
import pytest
from standin import metal
from test_standin import X, run

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

# By a pointer that says so.
RUN = """
    {align}threadgroup {kind} a[66], b[3];
    uint i = thread_position_in_grid.x;
    a[i] = ({kind})x[i];
    if (i < 3) b[i] = 0, a[i + 63] = ({kind})x[63];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    vec<{kind}, {n}> v = *reinterpret_cast<const threadgroup vec<{kind}, {n}>*>(a + {at});
    y[i] = (float)v[0] + 2 * (float)v[1];
"""


@pytest.mark.parametrize(("kind", "size"), [("float", 4), ("half", 2), ("bfloat", 2)])
def test_a_vector_is_one_access_that_must_be_aligned(kind, size):
    def value(align="alignas(16) ", n=2, at="i / 2 * 2"):
        return run(RUN.format(kind=kind, align=align, n=n, at=at))

    with metal.counters() as c:
        got = value()
    even = X.reshape(32, 2).repeat(2, 0)
    np.testing.assert_allclose(got, even[:, 0] + 2 * even[:, 1], atol=0.05)
    assert c.threadgroup_loads == 64
    assert c.threadgroup_read == 64 * 2 * size
    with pytest.raises(metal.MetalError, match=f"misaligned threadgroup read of {2 * size} bytes"):
        value(at="i")
    with pytest.raises(metal.MetalError, match=f"misaligned threadgroup read of {2 * size} bytes"):
        value(align="")  # an array lies at a multiple of its elements' size, and of no more than that
    with pytest.raises(metal.MetalError, match=f"out-of-bounds threadgroup read of {4 * size} bytes"):
        value(n=4, at="i / 4 * 4 + 4")  # of the last one only half lies in the array
