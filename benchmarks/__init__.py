"""HUT beside LoRA, HiRA and plain PyTorch: `python -m benchmarks` lists the suites."""
