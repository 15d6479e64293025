"""Folders on disks and in object stores, durable writes, and locks."""
