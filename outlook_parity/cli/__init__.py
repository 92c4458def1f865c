"""The commands of `outlook`, one per file; importing them imports no framework."""
