"""Learning from a stream, one sample at a time: many networks as one computation."""
