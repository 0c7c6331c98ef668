"""The Triton kernels: one file a kernel with its launcher, tiles.py shared, tables.py the rows."""
