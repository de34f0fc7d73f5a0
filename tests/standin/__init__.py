"""A stand-in for Metal: `mx.fast.metal_kernel`'s kernels on a CPU, every step watched. See README.md."""
