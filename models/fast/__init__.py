"""Faster classes for the layers of a HorNet, used through `models.accelerate` only.

accelerate.py   which layer gets which class
layers.py       these classes
lean.py         --memory lean: cheap results are recomputed in the backward pass
pointwise.py, depthwise.py, dispatch.py   operators for CPUs, and when they apply
triton_kernels.py   kernels for GPUs, imported by accelerate(triton=True) only
"""
