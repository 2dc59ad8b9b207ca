"""What the commands do: parity, benchmarks, the demo."""
