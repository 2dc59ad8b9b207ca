"""The operations that services call, one per file. Each picks C++ or torch by its arguments; experts on a GPU use Triton."""
