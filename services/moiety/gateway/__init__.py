"""The stateless front: text in, streamed text out."""
