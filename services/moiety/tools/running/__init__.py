"""What commands do with a system that runs: find it, show it, print its logs, end it."""
