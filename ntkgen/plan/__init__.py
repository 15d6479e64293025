"""What a kernel is made of and what it costs: integers only."""
