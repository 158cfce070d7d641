"""The least time that an operation takes on a card, by its bytes and FLOPs: a prediction, never a measurement."""

from ..profiling import Ceilings

CARDS = {
    "A100 SXM 80 GB": Ceilings(312, 2039),
    "RTX 4090": Ceilings(165.2, 1008),
    "H100 SXM": Ceilings(989.4, 3350),
    "H200 SXM": Ceilings(989.4, 4800),
    "B200": Ceilings(2250, 8000),
    "RTX 5090": Ceilings(209.5, 1792),
    "MI300X": Ceilings(1307.4, 5300),
}
"""Dense bfloat16 products with float32 sums, and memory. Sources: the vendors' datasheets (A100, H100, H200, HGX B200,
MI300X), NVIDIA's architecture whitepapers (Ada, RTX Blackwell). Datasheet numbers are seldom reached."""
