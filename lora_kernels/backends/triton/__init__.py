"""Kernels in Triton and what launches them, in fp32, fp16 and bf16; `cuda` plans what they serve.

With TRITON_INTERPRET=1, set before triton is imported, they run on CPU tensors.
"""
