"""Parents that read their children's weights, turned into parents that call them.

`nn.MultiheadAttention`, the fast path of `nn.TransformerEncoderLayer` and
torchvision's Swin attention hand weights to functions, so replacing a child
would break them. Unpacking such a parent gives an equal module whose
projections are ordinary `nn.Linear` children sharing the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rankopt._model import surgery

__all__ = ["UnpackedAttention", "is_registered", "register", "type_name", "unpack"]

Unpacker = Callable[[nn.Module, bool], nn.Module]
_UNPACKERS: dict[str, Unpacker] = {}


def register(type_name: str, unpacker: Unpacker) -> None:
    """Teach rankopt to unpack a parent class.

    Args:
        type_name: ``module.QualifiedName`` of the exact class, so that the
            class need not be imported.
        unpacker: Given the module and whether its packed projections must be
            split (cross-attention), returns an equal module that calls its
            children, or changes the given one and returns it.
    """
    if type_name in _UNPACKERS:
        raise ValueError(f"an unpacker for {type_name} is registered already")
    _UNPACKERS[type_name] = unpacker


def type_name(module: nn.Module) -> str:
    """``module.QualifiedName`` of a module's exact class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_registered(module: nn.Module) -> bool:
    """Whether the exact class of `module` has an unpacker."""
    return type_name(module) in _UNPACKERS


def unpack(
    model: nn.Module, only: Iterable[str] | None = None, split: Iterable[str] = ()
) -> nn.Module:
    """Unpack parents inside `model`, in place.

    Args:
        model: The tree to change; pass a clone.
        only: Layer names; just the parents above them are unpacked. None
            unpacks every parent there is.
        split: Names of attention modules that are called with different
            query and key: their packed projection becomes three.

    Returns:
        The root, replaced if it was itself such a parent.
    """
    allowed = None if only is None else surgery.ancestors(model, only)
    apart = set(split)
    new: dict[nn.Module, nn.Module] = {}
    for name, module in surgery.named_modules(model):
        unpacker = _UNPACKERS.get(type_name(module))
        if unpacker is None or module in new or (allowed is not None and module not in allowed):
            continue
        replacement = unpacker(module, name in apart)
        if replacement is not module:
            replacement.train(module.training)
            new[module] = replacement
    return surgery.replace(model, new)


def _linear(weight: Any, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` around existing parameters `weight` [out, in] and `bias` [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    linear._parameters["bias"] = bias
    return linear


def _rows(parameter: nn.Parameter | None, start: int, stop: int) -> nn.Parameter | None:
    if parameter is None:
        return None
    rows = parameter.detach()[start:stop]
    return nn.Parameter(rows.clone(), requires_grad=parameter.requires_grad)


class UnpackedAttention(nn.Module):
    """`nn.MultiheadAttention` that calls its projections as modules.

    Same arguments, same results; the projections are `in_proj` (packed
    [3E, E]) or `q_proj`, `k_proj`, `v_proj`, and `out_proj`, so each of them
    can be decomposed, hooked or quantised. Padded positions are computed like
    the others: the zero-filling of torch's inference fast path does not apply.

    Args:
        source: The module to unpack; parameters are shared with it, except
            that splitting a packed projection copies its rows.
        split: Whether a packed projection becomes three.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    # Read by nn.TransformerEncoderLayer; None keeps it off its fused path.
    in_proj_bias = None

    def __init__(self, source: nn.MultiheadAttention, *, split: bool = False) -> None:
        super().__init__()
        self.embed_dim = source.embed_dim
        self.num_heads = source.num_heads
        self.head_dim = source.head_dim
        self.kdim, self.vdim = source.kdim, source.vdim
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        self.add_zero_attn = source.add_zero_attn
        self._qkv_same_embed_dim = source._qkv_same_embed_dim
        packed_bias, size = source.in_proj_bias, source.embed_dim
        self.packed = source._qkv_same_embed_dim and not split
        if self.packed:
            self.in_proj = _linear(source.in_proj_weight, packed_bias)
        else:
            for index, letter in enumerate("qkv"):
                start, stop = index * size, (index + 1) * size
                weight = (
                    _rows(source.in_proj_weight, start, stop)
                    if source._qkv_same_embed_dim
                    else getattr(source, f"{letter}_proj_weight")
                )
                projection = _linear(weight, _rows(packed_bias, start, stop))
                self.add_module(f"{letter}_proj", projection)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.bias_k: Any = source.bias_k
        self.bias_v: Any = source.bias_v

    @property
    def in_proj_weight(self) -> Any:
        """The packed weight [3E, E] for readers outside, while the projections are dense."""
        if self.packed:
            return self.in_proj.weight
        if not self._qkv_same_embed_dim:
            return None
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])  # type: ignore[list-item]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, dim=-1))
        if type(self.in_proj) is nn.Linear:  # still dense: each input needs its rows only
            weights = self.in_proj.weight.chunk(3)
            biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
            triples = zip((query, key, value), weights, biases, strict=True)
            return tuple(F.linear(x, weight, bias) for x, weight, bias in triples)
        parts = {id(x): self.in_proj(x).chunk(3, dim=-1) for x in (query, key, value)}
        return parts[id(query)][0], parts[id(key)][1], parts[id(value)][2]

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, E] to [batch, heads, length, E / heads]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`, shapes included."""
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        causal = is_causal and key_padding_mask is None and not need_weights
        appended = k.shape[1] - key.shape[1 if batched and self.batch_first else 0]
        mask = None if causal and not appended else self._mask(attn_mask, key_padding_mask, q, k)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal and mask is None
            )
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to [batch, heads, L, S]."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            rows = _additive(padding, q.dtype)
            rows = (rows if rows.dim() == 2 else rows.unsqueeze(0))[:, None, None, :]
            total = rows if total is None else total + rows
        if total is not None and total.shape[-1] < k.shape[1]:
            total = F.pad(total, (0, k.shape[1] - total.shape[-1]))
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def _unpack_attention(module: nn.Module, split: bool) -> nn.Module:
    assert isinstance(module, nn.MultiheadAttention)
    owners = (module, module.out_proj)
    if any(is_parametrized(owner) for owner in owners):
        return module  # evaluating a parameter may change it, as spectral norm does
    named = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
             "weight", "bias")  # fmt: skip
    values = (getattr(owner, name, None) for owner in owners for name in named)
    if any(value is not None and type(value) is not nn.Parameter for value in values):
        return module  # pruned or reparametrised: what it computes is not in its parameters
    if "forward" in vars(module):
        return module
    unpacked = UnpackedAttention(module, split=split)
    for name, value in vars(module).items():
        if "_hooks" in name:
            unpacked.__dict__[name] = value
    return unpacked


def _avoid_fused_layer(module: Any, split: bool) -> nn.Module:
    """Keep `nn.TransformerEncoderLayer` off the fused kernel, which reads raw weights."""
    module.activation_relu_or_gelu = 0
    unfused: nn.Module = module
    return unfused


def _avoid_nested_tensors(module: Any, split: bool) -> nn.Module:
    """Keep `nn.TransformerEncoder` from reading its first layer's weights."""
    module.use_nested_tensor = False
    plain: nn.Module = module
    return plain


def _unpack_swin(module: nn.Module, split: bool) -> nn.Module:
    from rankopt._model import unpack_swin

    return unpack_swin.unpack(module)


register("torch.nn.modules.activation.MultiheadAttention", _unpack_attention)
register("torch.nn.modules.transformer.TransformerEncoderLayer", _avoid_fused_layer)
register("torch.nn.modules.transformer.TransformerEncoder", _avoid_nested_tensors)
register("torchvision.models.swin_transformer.ShiftedWindowAttention", _unpack_swin)
register("torchvision.models.swin_transformer.ShiftedWindowAttentionV2", _unpack_swin)
