"""A convolution as a sum of block terms, the bottleneck that it equals, and the series over all group-sizes."""
