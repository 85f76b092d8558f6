"""Dynamic masks chosen on the GPU: Triton kernels. Imported only where they run."""
