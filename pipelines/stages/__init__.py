"""The stages of a run: what is to be done, what is done, and how one unit is done. No Ray in here."""
