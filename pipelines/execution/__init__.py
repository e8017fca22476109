"""How units of work are executed: in this process, on Ray actors, or as trials of Ray Tune. Only here: Ray."""
