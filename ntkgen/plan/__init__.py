"""The tiles, the blocks and the cost of a kernel; integers only."""
