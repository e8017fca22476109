"""One run: its folder, the tables and checkpoints in it, their file format, the lock and the storage."""
