"""An HTTP client of any server that speaks OpenAI's API. Needs the extra `serve`; `moiety.client` does not import it."""
