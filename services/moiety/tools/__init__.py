"""What the commands do: parity, quantisation, inspection, rebalancing, the doctor and the demo."""
