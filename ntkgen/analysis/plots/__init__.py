"""Pictures of a stored kernel."""
