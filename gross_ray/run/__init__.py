"""One run: its folder, its tables and checkpoints, their file formats, the lock and the storage."""
