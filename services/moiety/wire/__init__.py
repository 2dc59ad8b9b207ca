"""What services exchange and how: frames, streams, deadlines, status codes, channels, transports."""
