"""The expert service: RPC handlers, a batching queue, and the device thread."""
