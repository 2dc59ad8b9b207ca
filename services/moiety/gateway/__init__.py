"""The gateway, the stateless public service: text in, streamed text out."""
