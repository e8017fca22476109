"""Datasets as tensors that can stay on a device, and their augmentation."""
