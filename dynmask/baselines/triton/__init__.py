"""Other methods on the GPU: Triton kernels. Imported only where they run."""
