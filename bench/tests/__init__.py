"""Tests of what the benchmark computes; nothing here is timed."""
