"""The operations that services call, one per file. Each picks the backend that suits its arguments: C++, Triton or torch."""
