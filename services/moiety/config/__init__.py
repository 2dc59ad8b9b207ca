"""Settings: frozen pydantic models, and the one place that reads them from flags, environment and files."""
