"""Search: what a configuration costs, how accurate it is, and which one to choose."""
