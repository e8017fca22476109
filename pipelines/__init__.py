"""The stages on Ray: the only place that knows it."""
