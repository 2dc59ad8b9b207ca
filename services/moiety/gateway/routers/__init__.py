"""The routers of a gateway: where a request is sent, and where it resumes after a loss."""
