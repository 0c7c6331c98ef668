"""HUT in other libraries: one folder each, imported only on demand."""
