"""C++ kernels for x86-64 CPUs with AVX-512, where torch stays far from memory speed. Built by `python -m moiety_kernels.cpu`."""
