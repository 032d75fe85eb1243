"""A package, so that processes which tests spawn can import its helpers as `tests.oracles...`."""
