"""Compressors of what clients send."""

from lightning_fed.compression.compressor import Compressor, DenseVector, Identity, Layer, SparseVector
from lightning_fed.compression.low_rank import LowRank
from lightning_fed.compression.quantization import Quantize, ScaledSign
from lightning_fed.compression.rand_k import RandK
from lightning_fed.compression.top_k import TopK

__all__ = [
    "Compressor",
    "DenseVector",
    "Identity",
    "Layer",
    "LowRank",
    "Quantize",
    "RandK",
    "ScaledSign",
    "SparseVector",
    "TopK",
]
