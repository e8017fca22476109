"""Block term decomposition: a convolution's weight in, block terms and the bottleneck they equal out."""
