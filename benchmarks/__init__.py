"""Benchmarks of HUT beside LoRA, HiRA and plain PyTorch: `python -m benchmarks.demo` to begin."""
