"""The situations of training: one file per promise of docs/reliability.md."""
