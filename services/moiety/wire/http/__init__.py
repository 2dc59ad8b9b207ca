"""The server of the HTTP API. It runs any ASGI app; what the API says is in `gateway/http/`."""
