"""The page about a stored kernel."""
