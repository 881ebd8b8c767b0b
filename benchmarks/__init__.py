"""What is measured, all in the form of `form`: `python -m benchmarks.NAME [--quick] [--out FOLDER]`."""
