"""The results of a run for people, as text and as an HTML page, built from its stored tables alone."""
