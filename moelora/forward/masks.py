"""Which tokens are real: padding masks of every form that transformers models take. Imports torch only.

Shapes: B batch, S tokens of this forward, P past plus present tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def token_mask(attention_mask: Any, length: int, past_length: int | Tensor | None = None) -> Tensor | None:
    """[B, S] bool, True on real tokens; None when the mask says nothing about padding.

    Args:
        attention_mask: None; [B, P] with 1 on real tokens; [B, heads, S or 1, P] of booleans or of additive floats
            (0 visible, very negative hidden); or a dict of such masks by attention type.
        length: S.
        past_length: tokens already in the KV cache; None without one, where a mask of another length is for others: a
            text's beside an image, or samples for frames.

    Example:
        >>> token_mask(torch.tensor([[0, 1, 1]]), 3).tolist()
        [[False, True, True]]
        >>> token_mask(torch.tensor([[0, 1, 1]]), 1, past_length=2).tolist()
        [[True]]
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        return None
    real = attention_mask > 0 if attention_mask.dim() == 2 else _real_keys(attention_mask)
    if real.shape[1] == length:
        return real
    if past_length is None:
        return None
    columns = past_length + torch.arange(length, device=real.device)
    return real.index_select(1, columns.clamp(max=real.shape[1] - 1))


def block_mask(arguments: Mapping[str, Any], length: int) -> Tensor | None:
    """[B, S] bool, True on real tokens, from the keyword arguments of a block; None where they tell of no padding.

    For what the model's own mask does not fit: frames of sound are fewer than the samples that it is for, and
    Longformer adds tokens up to a multiple of its window, of which `is_index_masked` tells.
    """
    if (padded := arguments.get("is_index_masked")) is not None:
        return ~padded
    return token_mask(arguments.get("attention_mask"), length)


def without_nothing(mask: Tensor | None) -> Tensor | None:
    """None in place of a mask that leaves out nothing, where that can be known and the host need not wait: on a CPU.

    Example:
        >>> without_nothing(torch.tensor([[True, True]])) is None
        True
    """
    if mask is None or mask.device.type != "cpu" or type(mask) is not Tensor:  # the values of fakes are not known
        return mask
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return mask
    return None if bool(mask.all()) else mask


def packed_mask(position_ids: Any) -> Tensor | None:
    """[B, S] bool for sequences packed in rows: False on the zeros that end a row of positions; None without [B, S].

    Collators that pad a packed row (TRL's padding_free with pad_to_multiple_of) mark it in no other way. A sequence of
    one token at the end looks the same; nothing is predicted from it, so leaving it out of the counts does no harm. A
    row of nothing but zeros is taken at its word.

    Example:
        >>> packed_mask(torch.tensor([[0, 1, 2, 0, 1, 0, 0]])).tolist()
        [[True, True, True, True, True, False, False]]
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    is_moving = position_ids != 0
    moves_later = is_moving.flip(-1).cumsum(-1).flip(-1) > 0
    return moves_later | ~is_moving.any(dim=-1, keepdim=True)


def _real_keys(attention_mask: Tensor) -> Tensor:
    """[B, heads, Q, P] -> [B, P]: a key is real when some query sees it."""
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    if not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool:
        visible = attention_mask > 0
    visible = visible[:, 0]
    # transformers opens the rows of padded queries completely, because softmax over nothing is NaN. Such a row says
    # nothing about keys. The last query is exempt: causal, it sees every real key, all of them when nothing is padded.
    says_something = ~visible.all(dim=-1, keepdim=True)
    says_something[:, -1] = True
    return (visible & says_something).any(dim=1)


def decoder_mask_from_labels(labels: Any) -> Tensor | None:
    """[B, S] bool for a decoder fed with labels shifted right: position i is real when label i - 1 is.

    Example:
        >>> decoder_mask_from_labels(torch.tensor([[5, 6, -100, -100]])).tolist()
        [[True, True, True, False]]
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    return torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], dim=1)
