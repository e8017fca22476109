"""What a run stores: the tables' schemas, and the run folder that holds tables and checkpoints."""
