"""The kernel on disk: what is in it, how it is written, opened and read."""
