"""What clients speak to: OpenAI's protocol over an engine."""
