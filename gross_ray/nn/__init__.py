"""Operations on any network: replace modules, trace calls, modes, precision and batch-norm."""
