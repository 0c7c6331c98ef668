"""The Triton kernels, each against float64, in Triton's interpreter."""
