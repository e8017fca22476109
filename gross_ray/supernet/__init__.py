"""Supernets: every group-size of a network's layers as one series, built, configured and extracted."""
