"""PEFT's own test-suite with `HUTConfig` in its lists: `python -m tests.peft_suite --help`."""
