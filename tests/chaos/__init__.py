"""The chaos suite: a run killed at random, at every file operation, on failing disks. ``make chaos`` prints a table."""
