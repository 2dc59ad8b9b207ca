"""Text formats: what models write to mark reasoning and tool calls. See README.md."""
