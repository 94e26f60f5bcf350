"""What the public data sets hold when they are whole. docs/datasets.md says more of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """Figures of a split as papers count them."""

    identities: int
    """People; distractors are none."""
    images: int
    """With distractors, without junk."""


@dataclass(frozen=True)
class KnownSet:
    """The figures of a public data set, and where they stand."""

    title: str
    train: Expected
    query: Expected
    gallery: Expected
    source: str
    one_camera: int = 0
    """Test identities that one camera alone has seen, by the set's own description."""


_CUHK03_NP = "https://github.com/zhunzhong07/person-re-ranking/tree/master/CUHK03-NP"
_MSMT17 = "Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018"

KNOWN_SETS = {
    "market1501": KnownSet(
        "Market-1501",
        train=Expected(751, 12_936),
        query=Expected(750, 3_368),
        # Its readme counts 19,732 gallery images; 3,819 of them are junk.
        gallery=Expected(750, 15_913),
        source="readme.txt of the set; Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015",
    ),
    "dukemtmc-reid": KnownSet(
        "DukeMTMC-reID",
        train=Expected(702, 16_522),
        query=Expected(702, 2_228),
        gallery=Expected(1_110, 17_661),
        source="https://github.com/sxzrt/DukeMTMC-reID_evaluation",
        one_camera=408,
    ),
    "cuhk03-np-detected": KnownSet(
        "CUHK03-NP detected",
        train=Expected(767, 7_365),
        query=Expected(700, 1_400),
        gallery=Expected(700, 5_332),
        source=_CUHK03_NP,
    ),
    "cuhk03-np-labeled": KnownSet(
        "CUHK03-NP labeled",
        train=Expected(767, 7_368),
        query=Expected(700, 1_400),
        gallery=Expected(700, 5_328),
        source=_CUHK03_NP,
    ),
    "msmt17-v1": KnownSet(
        "MSMT17",
        train=Expected(1_041, 32_621),
        query=Expected(3_060, 11_659),
        gallery=Expected(3_060, 82_161),
        source=_MSMT17,
    ),
    "msmt17-v2": KnownSet(
        "MSMT17 V2",
        train=Expected(1_041, 32_621),
        query=Expected(3_060, 11_659),
        gallery=Expected(3_060, 82_161),
        source=_MSMT17 + "; the same images with faces masked",
    ),
}
