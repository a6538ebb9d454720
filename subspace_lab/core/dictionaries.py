"""Reading and writing features of a sparse autoencoder, which are more than the dimensions and not orthogonal.

The difference of the features is exchanged, so that the part of a state that the autoencoder does not explain stays
the base's. This is not a subspace: exchanging all features does not exchange the whole state. And features that were
written are not exactly those that are read afterwards, because their directions overlap.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.core.arguments import finite, instance, no_zero_vector
from subspace_lab.core.orthonormal import exactly, wide
from subspace_lab.core.subspaces import Subspace


class Dictionary(Subspace):
    """Some features of a sparse autoencoder.

        fᵢ(h)       = uᵢ if uᵢ > θᵢ else 0,  u = E (h − c) + e        i of the chosen features
        read(h)     = f(h)
        write(h, z) = h + Dᵀ(z − f(h))

    So an exchange is h + Dᵀ(f(h_source) − f(h)), as in MIB (Mueller et al. 2025, arXiv 2504.13151). With θ = 0 the
    autoencoder has ReLU, with θ > 0 it has JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435). An autoencoder that
    keeps only the k largest features (top-k) is a different function.

    Args:
        encoder: E, (features, width).
        decoder: D, (features, width). Libraries often store one or both of them as (width, features).
        encoder_bias: e, (features,), 0 by default.
        input_bias: c, (width,), 0 by default: the autoencoder subtracts it before it encodes; often this is the
            decoder's bias. The decoder's bias itself cancels in an exchange and is not needed.
        threshold: θ ≥ 0, (features,), 0 by default.

    Raises:
        TypeError: something that is not a tensor.
        ValueError: shapes that do not fit, a direction of zeros, a threshold below 0.
    """

    linear: ClassVar[bool] = False
    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor
    input_bias: Tensor
    threshold: Tensor

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        *,
        encoder_bias: Tensor | None = None,
        input_bias: Tensor | None = None,
        threshold: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("encoder", encoder), ("decoder", decoder)):
            instance(given, Tensor, f"The {name}", "its shape is (features, width)")
        if encoder.ndim != 2 or encoder.shape != decoder.shape or not encoder.numel():
            raise ValueError(
                f"An encoder of shape {tuple(encoder.shape)} and a decoder of shape {tuple(decoder.shape)}: needed "
                "are (features, width) for both. Transpose what is stored as (width, features), as in W_enc.T."
            )
        features, width = encoder.shape
        shapes = {"encoder_bias": (features,), "input_bias": (width,), "threshold": (features,)}
        given_ones = {"encoder_bias": encoder_bias, "input_bias": input_bias, "threshold": threshold}
        tensors = {"encoder": encoder, "decoder": decoder}
        for name, shape in shapes.items():
            value = given_ones[name]
            tensors[name] = torch.zeros(shape) if value is None else value
            instance(tensors[name], Tensor, f"{name}", f"its shape is {shape}")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}; needed is {shape}.")
        for name, value in tensors.items():
            finite(value, name)
            # A copy, because the caller's own tensor may change.
            self.register_buffer(name, wide(value.detach(), torch.zeros(())).clone())
        no_zero_vector(self.decoder, 1, "decoder")
        if bool((self.threshold < 0).any()):
            raise ValueError(f"A threshold of {float(self.threshold.min()):g}; needed are numbers of 0 or more.")
        self.rank, self.width = int(features), int(width)

    def read(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        """f(h), in at least float32."""
        with exactly(h.device):
            h = wide(h, self.encoder)
            units = (h - self.input_bias.to(h.dtype)) @ self.encoder.to(h.dtype).T + self.encoder_bias.to(h.dtype)
            return units * (units > self.threshold.to(h.dtype))

    def embed(self, z: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch width"]:
        """Dᵀ z: the vector that these features add."""
        with exactly(z.device):
            return z @ self.decoder.to(z.dtype)

    def write(
        self, h: Float[Tensor, "*batch width"], z: Float[Tensor, "*batch rank"]
    ) -> Float[Tensor, "*batch width"]:
        found = self.read(h)
        return h + self.embed(z.to(found.dtype) - found).to(h.dtype)

    def difference(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch rank"]:
        return self.read(source) - self.read(h)

    def swap(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        return h + self.embed(self.difference(h, source)).to(h.dtype)

    def basis(self) -> Float[Tensor, "rank width"]:
        raise TypeError(
            "Features of an autoencoder have no orthonormal basis: they can be exchanged, read and written, but no "
            "other intervention, angle or overlap is defined for them. Their directions are `decoder`."
        )

    def frozen(self) -> Dictionary:
        return copy.deepcopy(self)

    def sliced(self, start: int, stop: int) -> Dictionary:
        return self.picked(range(start, stop))

    def picked(self, indices: Sequence[int]) -> Dictionary:
        chosen = torch.as_tensor(list(indices), device=self.encoder.device)
        return Dictionary(
            self.encoder[chosen],
            self.decoder[chosen],
            encoder_bias=self.encoder_bias[chosen],
            input_bias=self.input_bias,
            threshold=self.threshold[chosen],
        ).to(self.encoder.device)

    def description(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        biases = {name: tensors[name] for name in ("encoder_bias", "input_bias", "threshold")}
        return cls(tensors["encoder"], tensors["decoder"], **biases, **description)
