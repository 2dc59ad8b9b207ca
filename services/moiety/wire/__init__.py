"""What travels between services: messages, frames, deadlines, status codes, channels."""
