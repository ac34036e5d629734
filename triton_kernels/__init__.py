"""Device code and launchers. Imports torch, triton and its siblings, nothing of abft."""

if __name__ == "triton_kernels":
    # That name is the Triton project's, and others prefer any importable copy of it over their own.
    raise ImportError("these kernels are part of abft: import abft.triton_kernels")
