"""One command for a GPU: is every kernel right there, how fast is it, what should change."""
