"""C++ kernels for x86-64 CPUs with AVX-512: `python -m moiety_kernels.cpu` builds them."""
