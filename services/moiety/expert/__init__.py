"""The expert service: RPC room, waiting room, device room."""
