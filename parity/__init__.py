"""The suite against `torch` and `transformers`, and the writer of the reference files."""
