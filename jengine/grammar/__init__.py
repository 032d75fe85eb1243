"""Structured outputs: which tokens a grammar allows next. On the host only, without JAX."""
