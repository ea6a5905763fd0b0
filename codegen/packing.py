"""Packed weights: their layout belongs to the target, and is opaque to everyone else.

A packed weight is a tensor that a packing operator of the target made and its products read. Whoever stands
between them passes it on with the weight's own sizes and does not look at its shape.
"""

from __future__ import annotations

from torch import Tensor

from llm42c.codegen import quant


class Packing:
    """What a target's packing operators return: a method for each, of the operator's name and arguments.

    A layout may follow the weight's dtype, and whatever else the operator is told of it. The kernels are
    those of the target, as of any operator. Here a weight stays as it is, which is what references and
    simulators take for a packed one.
    """

    def linear_pack(self, weight: Tensor) -> Tensor:
        """weight: [N, K], fakes too → an empty tensor as ``llm42::linear_pack`` returns it."""
        return weight.new_empty(weight.shape)

    def quantised(self, values: quant.Values, format: str) -> Tensor:
        """A quantised weight as the target's products read it, which has its integers and scales.

        One layout serves all targets that have none of their own, so that a model may move between them.
        """
        return quant.pack(values, format)

    def quantised_values(self, packed: Tensor, format: str, n: int) -> quant.Values:
        """The exact inverse of :meth:`quantised` for a weight of ``n`` rows."""
        return quant.unpack(packed, format, n)
