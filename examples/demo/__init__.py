"""The demo: benchmarks a layer, then trains a small GPT with HUT and with LoRA."""
