"""Matrix products that carry the evidence that they are right, and repair themselves.

In a checkout the Triton kernels lie beside this package, in ``triton_kernels/``; installed, inside it. Both are
``abft.triton_kernels``: the top-level name belongs to the Triton project.
"""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"
