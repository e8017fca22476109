"""Executors of units: in this process, on Ray actors, or as trials of Ray Tune. Only this folder imports Ray."""
