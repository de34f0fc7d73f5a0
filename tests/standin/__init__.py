"""A stand-in for Metal: runs the kernels of `mx.fast.metal_kernel` on a CPU, watching every step. See README.md."""
