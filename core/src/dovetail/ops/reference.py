"""Reference operations: what every operation of the op table means, in plain torch on any device.

They are oracles before they are fast: low-precision inputs are computed in float32 and rounded once at the
end, float64 inputs stay float64. Dimension letters are those of :mod:`dovetail.contracts`; ``A`` counts the
experts of one token and ``E`` all experts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.ops import sampling
from dovetail.ops.sampling import SamplingTensors


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale each row to root mean square 1, then by ``weight`` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x_TD: ``[..., D]``; any leading dimensions.
        weight_D: ``[D]``.
        eps: added to the mean square.

    Returns:
        Shape and dtype of ``x``.
    """
    x = _wide(x_TD)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_D.to(x.dtype)).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then normalise it.

    Returns:
        ``rms_norm(x + residual)`` and ``x + residual``, both in the dtype of ``x``; the norm reads the
        rounded sum.
    """
    residual_TD = x_TD + residual_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD


def add_rms_norm_quantize(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm`, whose first result, as it was rounded, goes through :func:`quantize_rows`.

    A table in which either is overridden, and this is not, runs the two of the table.

    Returns:
        The norm's values ``[T, D]`` in ``dtype``, their scales, and ``x + residual``.
    """
    normed_TD, residual_TD = add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return *quantize_rows(normed_TD, dtype, group_size), residual_TD


def rotary(q_THK: Tensor, k_TNK: Tensor, positions_T: Tensor, cos_sin_PK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (Su et al. 2021, arXiv:2104.09864).

    Element ``i`` of the first half of the rotary dimensions pairs with element ``i`` of the second half.

    Args:
        q_THK, k_TNK: ``[T, H, K]`` and ``[T, N, K]``.
        positions_T: row of ``cos_sin`` for each token.
        cos_sin_PK: float32 ``[positions, rotary_dim]``: cosines in the first half, sines in the second.
            Elements of a head beyond ``rotary_dim`` pass unchanged.
    """
    cos_TK, sin_TK = cos_sin_PK[positions_T].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q_THK, cos_TK, sin_TK), _rotate(k_TNK, cos_TK, sin_TK)


def _rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    x = _wide(x_THK)
    half = cos_TK.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos_TK.to(x.dtype), sin_TK.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x_THK.dtype)


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """Gated activation ``silu(gate) × up`` (Shazeer 2020, arXiv:2002.05202).

    Args:
        x_T2F: ``[..., 2 F]``: gate, then up.

    Returns:
        ``[..., F]`` in the dtype of ``x``.
    """
    gate, up = _wide(x_T2F).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x_T2F.dtype)


def gelu_tanh_and_mul(x_T2F: Tensor) -> Tensor:
    """Gated activation ``gelu(gate) × up``, with the tanh form of gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        x_T2F: ``[..., 2 F]``: gate, then up.

    Returns:
        ``[..., F]`` in the dtype of ``x``.
    """
    gate, up = _wide(x_T2F).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x_T2F.dtype)


def silu_and_mul_quantize(
    x_T2F: Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`silu_and_mul` of ``[T, 2 F]``, whose result, as it was rounded, goes through :func:`quantize_rows`.

    A table in which either is overridden, and this is not, runs the two of the table.
    """
    return quantize_rows(silu_and_mul(x_T2F), dtype, group_size)


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of the table: ``[T, D]`` in its dtype.

    A platform that overrides this operation also accepts what its ``linear_pack`` made of the table.
    """
    return F.embedding(ids_T, table_VD)


def linear_pack(weight_OI: Tensor) -> Tensor:
    """Bring a weight ``[O, I]`` into the form that :func:`linear` reads; here it stays itself."""
    return weight_OI


def linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weightᵀ + bias``: ``[T, O]`` in the dtype of ``x``.

    ``packed`` comes from :func:`linear_pack`, and nothing writes to it while steps run.
    """
    return F.linear(x_TI, packed, bias_O)


def linear_silu_and_mul(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """:func:`silu_and_mul` of :func:`linear`, whose outputs are gate, then up: ``[T, O / 2]``.

    A table in which ``linear`` or ``silu_and_mul`` is overridden, and this is not, runs the two of the table. An
    override need not round what is between them.
    """
    return silu_and_mul(linear(x_TI, packed, bias_O))


class ScaledWeight(NamedTuple):
    """A quantized weight: element ``[o, i]`` is ``weight[o, i] × scale[o, i // group_size]``."""

    weight_OI: Tensor
    scale_OG: Tensor
    group_size: int


def quantize_rows(x_TI: Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row by its own largest magnitude, which becomes the largest number of ``dtype``.

    Args:
        x_TI: ``[T, I]``, any floating-point dtype.
        dtype: int8 (symmetric, -127 .. 127) or float8_e4m3fn.
        group_size: consecutive elements of a row that share a scale, the last group may be shorter; None means the row.

    Returns:
        ``[T, I]`` in ``dtype``, and float32 scales ``[T, G]`` by which to multiply it. Ties round to even. A group of
        zeros has a tiny scale; one that holds infinities or NaN has a scale that is not finite, and unspecified values.
    """
    tokens, inputs = x_TI.shape
    group = group_size or inputs
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    x_TGI = F.pad(x_TI.to(torch.float32), (0, -inputs % group)).view(tokens, -(-inputs // group), group)
    scale_TG1 = x_TGI.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    values_TI = (x_TGI / scale_TG1).clamp(-largest, largest).flatten(1)[:, :inputs]
    return (values_TI.round() if dtype == torch.int8 else values_TI).to(dtype), scale_TG1.squeeze(-1)


def weight_only_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int | None = None) -> ScaledWeight:
    """Bring a quantized weight and its scales into the form that :func:`weight_only_mm` reads.

    Args:
        weight_OI: int8 or float8_e4m3fn ``[O, I]``.
        scale_OG: float32 ``[O, G]``: a scale per output and per group of inputs.
        group_size: consecutive inputs that share a scale, the last group may be shorter; None means all of them.
    """
    return ScaledWeight(weight_OI, scale_OG, group_size or weight_OI.shape[1])


def weight_only_mm(x_TI: Tensor, packed: ScaledWeight, bias_O: Tensor | None = None) -> Tensor:
    """``x @ (weight × scale)ᵀ + bias``: ``[T, O]`` in the dtype of ``x``; ``packed`` from :func:`weight_only_pack`."""
    dtype = _wide_dtype(x_TI.dtype)
    bias = None if bias_O is None else bias_O.to(dtype)
    return F.linear(x_TI.to(dtype), _dequantize(*packed, dtype), bias).to(x_TI.dtype)


def block_scaled_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> ScaledWeight:
    """Bring a quantized weight and its scales into the form that :func:`block_scaled_mm` reads.

    Args:
        weight_OI: int8 or float8_e4m3fn ``[O, I]``.
        scale_OG: float32 ``[O, G]``: a scale per output and per group of inputs. Formats with square blocks repeat a
            scale for each output of the block.
        group_size: consecutive inputs that share a scale; the last group may be shorter.
    """
    return ScaledWeight(weight_OI, scale_OG, group_size)


def block_scaled_mm(x_TI: Tensor, packed: ScaledWeight, x_scale_TG: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Product of two matrices that are quantized in groups of inputs (arXiv:2412.19437, section 3.3).

    Args:
        x_TI: ``[T, I]`` in the dtype of the weight.
        packed: from :func:`block_scaled_pack`.
        x_scale_TG: float32 ``[T, G]``, in the same groups as the weight.
        out_dtype: of the result ``[T, O]``.
    """
    x_TI = _dequantize(x_TI, x_scale_TG, packed.group_size, torch.float32)
    return F.linear(x_TI, _dequantize(*packed, torch.float32)).to(out_dtype)


def _dequantize(values_RI: Tensor, scale_RG: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    scale_RI = scale_RG.to(dtype).repeat_interleave(group_size, dim=1)[:, : values_RI.shape[1]]
    return values_RI.to(dtype) * scale_RI


def scaled_mm_pack(weight_OI: Tensor) -> Tensor:
    """Bring a quantized weight ``[O, I]`` into the form that :func:`scaled_mm` reads; here it stays itself."""
    return weight_OI


def scaled_mm(
    x_TI: Tensor, weight_OI: Tensor, x_scale_T1: Tensor, weight_scale_O1: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Product of two quantized matrices: ``(x × x_scale) @ (weight × weight_scale)ᵀ``.

    Args:
        x_TI: ``[T, I]``, int8 or float8.
        weight_OI: ``[O, I]`` in the same dtype; every platform takes it as it is, and from :func:`scaled_mm_pack`.
        x_scale_T1: float32 ``[T, 1]``, or ``[1, 1]`` for one scale per tensor.
        weight_scale_O1: float32 ``[O, 1]`` or ``[1, 1]``.
        out_dtype: of the result ``[T, O]``.
    """
    product_TO = x_TI.to(torch.float32) @ weight_OI.to(torch.float32).t()
    return (product_TO * x_scale_T1 * weight_scale_O1.t()).to(out_dtype)


def w4a16_mm(x_TI: Tensor, weight_packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """``x @ weightᵀ`` with 4-bit weights, scaled per group of input features.

    Args:
        x_TI: ``[T, I]``.
        weight_packed: uint8 ``[O, I / 2]``: unsigned values 0..15, input feature ``2 j`` in the low half of
            byte ``j`` and ``2 j + 1`` in the high half.
        scales: ``[O, I / group_size]``.
        zeros: zero points in units of the packed values, ``[O, I / group_size]``; None means 8 everywhere.
        group_size: consecutive input features that share a scale; divides ``I``.

    Returns:
        ``[T, O]`` in the dtype of ``x``; a weight is ``(value - zero) × scale``.
    """
    dtype = _wide_dtype(x_TI.dtype)
    values_OI = torch.stack([weight_packed & 0xF, weight_packed >> 4], dim=-1).flatten(1)
    groups_OGI = values_OI.to(dtype).view(*scales.shape, group_size)
    zeros_OG1 = 8.0 if zeros is None else zeros.to(dtype).unsqueeze(-1)
    weight_OI = ((groups_OGI - zeros_OG1) * scales.to(dtype).unsqueeze(-1)).flatten(1)
    return F.linear(x_TI.to(dtype), weight_OI).to(x_TI.dtype)


def choose_experts(logits_TE: Tensor, num_active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, of which each token takes the most probable (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        logits_TE: ``[T, E]``.
        num_active: experts per token, ``A``.
        normalize: whether the chosen experts' probabilities are scaled to sum to 1.

    Returns:
        int64 ids ``[T, A]``, the most probable first, of equals any; and float32 weights ``[T, A]``.
    """
    weights_TA, ids_TA = _wide(logits_TE).softmax(-1).topk(num_active, dim=-1)
    if normalize:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    return ids_TA, weights_TA.to(torch.float32)


def experts_pack(weight_EOI: Tensor) -> Tensor:
    """Bring stacked weights ``[E, O, I]`` into the form that :func:`moe_experts` reads; here they stay themselves."""
    return weight_EOI


def moe_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor, expert_weights_TA: Tensor
) -> Tensor:
    """Mixture of gated feed-forward experts (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        x_TD: ``[T, D]``.
        gate_up_EFD: ``[E, 2 F, D]``: each expert's gate rows, then its up rows; from :func:`experts_pack`.
        down_EDF: ``[E, D, F]``; from :func:`experts_pack`.
        expert_ids_TA: the experts of each token; an id outside ``0 .. E - 1`` adds nothing.
        expert_weights_TA: factor of each expert's output.

    Returns:
        ``[T, D]`` in the dtype of ``x``; the weighted sum is taken in float32.
    """
    out_TD = torch.zeros_like(x_TD, dtype=_wide_dtype(x_TD.dtype))
    weights_TA = expert_weights_TA.to(out_TD.dtype)
    for expert, (gate_up_FD, down_DF) in enumerate(zip(gate_up_EFD, down_EDF, strict=True)):
        token, choice = (expert_ids_TA == expert).nonzero(as_tuple=True)
        if len(token):
            y = F.linear(silu_and_mul(F.linear(x_TD[token], gate_up_FD)), down_DF)
            out_TD.index_add_(0, token, y.to(out_TD.dtype) * weights_TA[token, choice].unsqueeze(-1))
    return out_TD.to(x_TD.dtype)


class QuantizedExperts(NamedTuple):
    """Quantized weights of all experts: element ``[e, o, i]`` is ``(value[e, o, i] - zero[e, o, g]) × scale[e, o, g]``,
    where ``g`` is ``i // group_size``.
    """

    weight_EOI: Tensor
    scale_EOG: Tensor
    zero_EOG: Tensor | None
    group_size: int


def quantized_experts_pack(
    weight_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor | None = None, group_size: int | None = None
) -> QuantizedExperts:
    """Bring the quantized weights of all experts into the form that :func:`quantized_experts_mm` reads.

    Args:
        weight_EOI: int8 or float8_e4m3fn ``[E, O, I]``; or uint8 ``[E, O, I / 2]``, pairs of 4-bit values as in
            :func:`w4a16_mm`.
        scale_EOG: ``[E, O, G]``: a scale per output and per group of inputs.
        zero_EOG: zero points of pairs, in units of the values; None means 8 everywhere.
        group_size: consecutive inputs that share a scale, the last group may be shorter; None means all of them.
    """
    inputs = weight_EOI.shape[2] * (2 if weight_EOI.dtype == torch.uint8 else 1)
    return QuantizedExperts(weight_EOI, scale_EOG, zero_EOG, group_size or inputs)


def quantized_experts_mm(
    x_NI: Tensor,
    packed: QuantizedExperts,
    starts_E1: Tensor,
    x_scale_NG: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Products of rows that are sorted by expert, each with its own expert's quantized weight.

    Args:
        x_NI: ``[N, I]``, wide, or in the dtype of the weight.
        packed: from :func:`quantized_experts_pack`.
        starts_E1: int64 ``[E + 1]``: expert e has the rows ``starts[e] : starts[e + 1]``; all rows have one.
        x_scale_NG: float32 scales of quantized rows, in the groups of the weight.
        out_dtype: of the result ``[N, O]``; None means that of ``x``.
    """
    dtype = _wide_dtype(x_NI.dtype)
    x = x_NI.to(dtype) if x_scale_NG is None else _dequantize(x_NI, x_scale_NG, packed.group_size, dtype)
    out_NO = x.new_zeros((len(x), packed.weight_EOI.shape[1]))
    for expert, (start, end) in enumerate(pairwise(starts_E1.tolist())):
        if start < end:
            out_NO[start:end] = F.linear(x[start:end], _expert(packed, expert, dtype))
    return out_NO.to(out_dtype or x_NI.dtype)


def _expert(packed: QuantizedExperts, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's weight ``[O, I]``."""
    values_OI, scale_OG = packed.weight_EOI[expert], packed.scale_EOG[expert]
    if values_OI.dtype != torch.uint8:
        return _dequantize(values_OI, scale_OG, packed.group_size, dtype)
    values_OI = torch.stack([values_OI & 0xF, values_OI >> 4], dim=-1).flatten(1).to(dtype)
    zero_OG = torch.full_like(scale_OG, 8) if packed.zero_EOG is None else packed.zero_EOG[expert]
    zero_OI = zero_OG.to(dtype).repeat_interleave(packed.group_size, dim=1)[:, : values_OI.shape[1]]
    return _dequantize(values_OI - zero_OI, scale_OG, packed.group_size, dtype)


def write_kv(k_TNK: Tensor, v_TNK: Tensor, k_cache_BPNK: Tensor, v_cache_BPNK: Tensor, slot_mapping_T: Tensor) -> None:
    """Store keys and values in the paged cache, in place.

    Args:
        k_TNK, v_TNK: ``[T, N, K]``.
        k_cache_BPNK, v_cache_BPNK: ``[blocks, tokens per block, N, K]``; any dtype and strides.
        slot_mapping_T: int64 ``block × tokens per block + offset`` of each token. Padding tokens share a
            place in the null block, whose content is unspecified.
    """
    block_size = k_cache_BPNK.shape[1]
    place = (slot_mapping_T // block_size, slot_mapping_T % block_size)
    k_cache_BPNK[place] = k_TNK.to(k_cache_BPNK.dtype)
    v_cache_BPNK[place] = v_TNK.to(v_cache_BPNK.dtype)


def paged_attention(
    q_THK: Tensor,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    seq_lens_R: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of a ragged batch over a paged cache (Kwon et al. 2023, arXiv:2309.06180).

    Request ``r`` holds query tokens ``query_start[r] : query_start[r + 1]``, the last of its ``seq_lens[r]``
    tokens, whose keys and values are in the cache already. Query head ``h`` reads key/value head
    ``h // (H / N)``.

    Args:
        q_THK: ``[T, H, K]``.
        k_cache_BPNK, v_cache_BPNK: ``[blocks, tokens per block, N, K]``.
        block_table_RB: block of each page; only pages with visible tokens are read.
        query_start_R1, seq_lens_R: int32 ``[R + 1]`` and ``[R]``. A request without query tokens is padding.
        scale: factor on ``q · k``.
        window: each query sees itself and the ``window - 1`` tokens before it; None sees all before.
        soft_cap: scores become ``cap × tanh(score / cap)``.

    Returns:
        ``[T, H × K]`` in the dtype of ``q``; zeros for padding tokens. The softmax is taken in float32.
    """
    out_THK = torch.zeros_like(q_THK)
    block_size = k_cache_BPNK.shape[1]
    starts, seq_lens = query_start_R1.tolist(), seq_lens_R.tolist()
    for r, (start, end, seq_len) in enumerate(zip(starts[:-1], starts[1:], seq_lens, strict=True)):
        if end == start:
            continue
        first_query = seq_len - (end - start)
        first_key = 0 if window is None else max(0, first_query - window + 1)
        positions_L = torch.arange(first_key, seq_len, device=q_THK.device)
        place = (block_table_RB[r, positions_L // block_size].long(), positions_L % block_size)
        distance_TL = positions_L[first_query - first_key :].unsqueeze(1) - positions_L
        visible_TL = (distance_TL >= 0) & (distance_TL < (window or seq_len))
        out_THK[start:end] = _attend(
            q_THK[start:end], k_cache_BPNK[place], v_cache_BPNK[place], visible_TL, scale, soft_cap
        )
    return out_THK.flatten(1)


def _attend(
    q_THK: Tensor, k_LNK: Tensor, v_LNK: Tensor, visible_TL: Tensor, scale: float, soft_cap: float | None
) -> Tensor:
    """Attention of one request's queries over its gathered keys and values."""
    dtype = _wide_dtype(q_THK.dtype)
    q_TNGK = q_THK.to(dtype).reshape(len(q_THK), k_LNK.shape[1], -1, k_LNK.shape[2])
    scores_NGTL = torch.einsum("tngk,lnk->ngtl", q_TNGK, k_LNK.to(dtype)) * scale
    if soft_cap is not None:
        scores_NGTL = soft_cap * torch.tanh(scores_NGTL / soft_cap)
    probs_NGTL = scores_NGTL.masked_fill(~visible_TL, -torch.inf).softmax(-1)
    return torch.einsum("ngtl,lnk->tngk", probs_NGTL, v_LNK.to(dtype)).flatten(1, 2).to(q_THK.dtype)


def sample(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Choose one token per row: temperature, min-p, top-k, top-p, then Gumbel-max with stateless noise.

    Args:
        logits_SV: ``[S, V]``, bias, masks and penalties applied.
        params: one entry per row.

    Returns:
        int64 ``[S]``. A row's token depends on that row alone, never on its neighbours.
    """
    return sampling.sample_tokens(logits_SV, params)


def filter_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Logits over temperature, with ``-inf`` for what min-p, top-k or top-p drops: whose softmax :func:`sample` draws
    from.

    Args:
        logits_SV: ``[S, V]``, bias, masks and penalties applied.
        params: one entry per row; greedy rows are only converted.

    Returns:
        float32 ``[S, V]``, a new tensor. Rows with NaN or without a finite logit have unspecified values.
    """
    return sampling.filter_logits(logits_SV, params)


def sample_residual(probs_RV: Tensor, draft_probs_RV: Tensor, params: SamplingTensors) -> Tensor:
    """Draw from ``(p - q)⁺``, what is left of p where a draft from q was rejected (Leviathan et al. 2023,
    arXiv:2211.17192).

    Args:
        probs_RV, draft_probs_RV: float32 ``[R, V]``: p and q. Where nothing is left, p itself counts.
        params: one entry per row; seeds and positions are read.

    Returns:
        int64 ``[R]``; Gumbel-max with noise that :func:`sample` does not use.
    """
    return sampling.sample_residual(probs_RV, draft_probs_RV, params)


def penalize(
    logits_SV: Tensor, rows_P: Tensor, slots_P: Tensor, factors_B3: Tensor, counts_BV: Tensor, in_prompt_BV: Tensor
) -> None:
    """Lower the logits of tokens that a request has seen, in place.

    Repetition (Keskar et al. 2019, arXiv:1909.05858) looks at prompt and output; frequency and presence, as OpenAI
    defines them, at the output alone.

    Args:
        logits_SV: float32 ``[S, V]``.
        rows_P, slots_P: int64: the rows to change, none twice, and of each the entry in the tables.
        factors_B3: float32: repetition, frequency and presence penalty.
        counts_BV: int32: how often each token is in the output.
        in_prompt_BV: bool: whether it is in the prompt.
    """
    logits_PV, counts_PV = logits_SV[rows_P], counts_BV[slots_P]
    repetition_P1, frequency_P1, presence_P1 = factors_B3[slots_P].unsqueeze(2).unbind(1)
    seen_PV = (counts_PV > 0) | in_prompt_BV[slots_P]
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(seen_PV, repeated_PV, logits_PV)
    logits_SV[rows_P] = logits_PV.sub_(frequency_P1 * counts_PV).sub_(presence_P1 * (counts_PV > 0))


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of one token per row and of each row's most likely tokens.

    Args:
        logits_SV: ``[S, V]``.
        tokens_S: int64, a token of each row.
        k: how many of the most likely tokens; at most V.

    Returns:
        float32 ``[S]``: the token's log-probability; int64 ``[S]``: its rank, 1 and the number of larger logits;
        int64 and float32 ``[S, k]``: the tokens of the largest logits, equals by ascending id, and their
        log-probabilities. Rows with NaN or without a finite logit have unspecified values.
    """
    logits_SV = _wide(logits_SV)
    logprobs_SV = logits_SV.log_softmax(-1)
    place_S1 = tokens_S.unsqueeze(1)
    ranks_S = (logits_SV > logits_SV.gather(1, place_S1)).sum(-1) + 1
    ids_SK = _largest(logits_SV, k)
    chosen_S, top_SK = (logprobs_SV.gather(1, ids).to(torch.float32) for ids in (place_S1, ids_SK))
    return chosen_S.squeeze(1), ranks_S, ids_SK, top_SK


def _largest(x_SV: Tensor, k: int) -> Tensor:
    """Columns of the largest float32 numbers, equals in order: the number's bits, then the column, in one integer."""
    bits_SV = x_SV.to(torch.float32).add(0.0).view(torch.int32)  # a zero has one sign
    # The bits of positive floats grow with the number, those of negative ones with its magnitude.
    keys_SV = torch.where(bits_SV < 0, bits_SV ^ 0x7FFFFFFF, bits_SV).to(torch.int64) << 32
    columns_V = torch.arange(x_SV.shape[1] - 1, -1, -1, device=x_SV.device)
    return keys_SV.add_(columns_V).topk(k).indices


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x.dtype))
