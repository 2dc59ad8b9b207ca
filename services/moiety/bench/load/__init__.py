"""`moiety bench load`: a load generator for any server that speaks OpenAI's API."""
