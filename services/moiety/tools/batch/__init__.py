"""`moiety batch`: a file of requests in OpenAI's batch format, sent to a running server."""
