"""The stages of a run: the units of each, which of them are done, and the work on one unit. No Ray in here."""
