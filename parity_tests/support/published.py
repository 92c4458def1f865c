"""Sizes of VOLO as others print them: the paper's FLOPs, quoted by two repositories, and timm's own counts.

The paper's table itself (arXiv:2106.13112) was not at hand, and github.com/sail-sg/volo prints no FLOPs. The paper's
numbers for D2 at 384, D3 at 448 and D4 at 448 pixels are quoted nowhere that was found.
"""

from typing import NamedTuple

# (variant, pixels) -> billions of multiply-adds, the paper's "FLOPs".
# Quoted "from their papers" at 224 pixels by github.com/sithu31296/sota-backbones, in early versions of its README; of
# D1 and D5, at all sizes, by github.com/jiawangbai/HAT, two of whose authors are VOLO's.
FLOPS_OF_PAPER: dict[tuple[str, int], float] = {
    ("d1", 224): 6.8,
    ("d1", 384): 22.8,
    ("d2", 224): 14.1,
    ("d3", 224): 20.6,
    ("d4", 224): 43.8,
    ("d5", 224): 69.0,
    ("d5", 448): 304,
    ("d5", 512): 412,
}


class CountedByTimm(NamedTuple):
    """A row of timm's results: billions of multiply-adds, millions of parameters."""

    gmacs: float
    params: float


# github.com/huggingface/pytorch-image-models at aa4b585, results/benchmark-infer-amp-nchw-pt291-cu128-4090.csv.
COUNTED_BY_TIMM: dict[str, CountedByTimm] = {
    "volo_d1_224": CountedByTimm(6.94, 26.63),
    "volo_d1_384": CountedByTimm(22.75, 26.78),
    "volo_d2_224": CountedByTimm(14.34, 58.68),
    "volo_d2_384": CountedByTimm(46.17, 58.87),
    "volo_d3_224": CountedByTimm(20.78, 86.33),
    "volo_d3_448": CountedByTimm(96.33, 86.63),
    "volo_d4_224": CountedByTimm(44.34, 192.96),
    "volo_d4_448": CountedByTimm(197.13, 193.41),
    "volo_d5_224": CountedByTimm(72.4, 295.46),
    "volo_d5_448": CountedByTimm(315.06, 295.91),
    "volo_d5_512": CountedByTimm(425.09, 296.09),
}
