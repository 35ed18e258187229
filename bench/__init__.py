"""The benchmark suite: `python -m bench`. What the numbers mean: README.md."""
