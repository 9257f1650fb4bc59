"""The CPU engine: kernels, passes and workers for Mixers and pyramids. `accelerate` is its door.

It knows the models; no model knows it. A module that stands in none of its tables is computed by torch.
"""
