"""The network computed faster; nothing outside this folder knows of it but `models.accelerate`.

accelerate.py decides which layer gets which class, layers.py holds these classes, lean.py computes
cheap results again in the backward pass; pointwise.py and depthwise.py are the operators for CPUs,
triton_kernels.py those for GPUs, imported by accelerate(triton=True) only.
"""
