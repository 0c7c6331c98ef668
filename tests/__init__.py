"""The test suite; it mirrors hut_kernels/, file by file."""
