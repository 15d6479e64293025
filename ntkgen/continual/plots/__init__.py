"""Pictures of a recorded run. They need no torch."""
