"""The bodies of the commands, and what they share: options, one-line errors, progress on a terminal."""
