"""A weight matrix in the form in which it is stored: what readers make and engines multiply.

`Linear` is the contract (`base.py`); each form is a file.
"""

from paceline.models.tensors.base import (
    Linear,
    Nested,
    from_tensors,
    narrow,
    nested_forms,
    to_dense,
    widen,
)
from paceline.models.tensors.bit_planes import BitPlanes
from paceline.models.tensors.block_quantized import BlockQuantized
from paceline.models.tensors.codebook import Codebook
from paceline.models.tensors.composed import LowRank, Sum
from paceline.models.tensors.dense import Dense, narrowest
from paceline.models.tensors.grouped import Grouped
from paceline.models.tensors.nested_codes import NestedCodes
from paceline.models.tensors.packed_floats import PackedFloats, pack_smallest
from paceline.models.tensors.pivoted import Pivoted
from paceline.models.tensors.rounded_inputs import RoundedInputs
from paceline.models.tensors.sign_blocks import SignBlocks
from paceline.models.tensors.sparse import Sparse
from paceline.models.tensors.tensor_train import TensorTrain
from paceline.models.tensors.transformed import Transformed
from paceline.models.tensors.two_grained import TwoGrained
from paceline.models.tensors.widths import Widths

__all__ = [
    "BitPlanes",
    "BlockQuantized",
    "Codebook",
    "Dense",
    "Grouped",
    "Linear",
    "LowRank",
    "Nested",
    "NestedCodes",
    "PackedFloats",
    "Pivoted",
    "RoundedInputs",
    "SignBlocks",
    "Sparse",
    "Sum",
    "TensorTrain",
    "Transformed",
    "TwoGrained",
    "Widths",
    "from_tensors",
    "narrow",
    "narrowest",
    "nested_forms",
    "pack_smallest",
    "to_dense",
    "widen",
]
