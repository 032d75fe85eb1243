"""Several processes as one engine: the step protocol between a leader and its followers."""
