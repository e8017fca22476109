"""The bodies of the commands, and the parts that they share: options, one-line errors, progress on a terminal."""
