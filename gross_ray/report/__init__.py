"""What people look at: built from stored tables alone."""
