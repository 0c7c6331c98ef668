"""What training does to a layer: one file per promise of docs/reliability.md."""
