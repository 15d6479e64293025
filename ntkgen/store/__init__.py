"""The kernel on disk: its format, and how it is written, opened and read."""
