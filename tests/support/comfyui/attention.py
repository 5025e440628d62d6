"""ComfyUI's attention: one function, and the place where an override comes before it."""

from torch.nn.functional import scaled_dot_product_attention


def _attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
    skip_output_reshape=False, **kwargs,
):  # fmt: skip
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(2, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=kwargs.get("scale"),
        enable_gqa=kwargs.get("enable_gqa", False),
    )  # fmt: skip
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args, **kwargs):
    """(batch, tokens, heads * head_dim) of q, k, v, heads and the rest of `_attention`'s."""
    options = kwargs.get("transformer_options") or {}
    override = options.get("optimized_attention_override")
    if override is not None and "_inside_attn_wrapper" not in kwargs:
        return override(_attention, *args, _inside_attn_wrapper=True, **kwargs)
    return _attention(*args, **kwargs)
