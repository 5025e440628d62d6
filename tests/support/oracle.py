"""CLEAR attention from its definition, in float64, written without the package's own helpers."""

import math

import torch


def mask_by_definition(window) -> torch.Tensor:
    """(text + image, text + image) bool, by a loop over image tokens."""
    text, total = window.text_length, window.text_length + window.height * window.width
    mask = torch.ones(total, total, dtype=torch.bool)
    ys = torch.arange(window.height)[:, None]
    xs = torch.arange(window.width)[None, :]
    for y in range(window.height):
        for x in range(window.width):
            inside = (ys - y) ** 2 + (xs - x) ** 2 < window.radius**2
            mask[text + y * window.width + x, text:] = inside.flatten()
    return mask


def pool_by_definition(tokens, window, weight):
    """Sum of weight times token over each cell, times (cell size / tokens present)."""
    f = window.down_factor
    image = tokens[:, window.text_length :].unflatten(1, (window.height, window.width))
    cells = []
    for top in range(0, window.height, f):
        for left in range(0, window.width, f):
            cell = image[:, top : top + f, left : left + f]
            part = weight[: cell.shape[1], : cell.shape[2]]
            present = part.numel()
            cells.append((cell * part[None, :, :, None, None]).sum(dim=(1, 2)) * (f * f / present))
    return torch.stack(cells, dim=1)


def far_cells(window):
    """(level, top, left, tokens in it) of every cell, in the order of the far keys."""
    for level in range(1, window.far_levels + 1):
        side = 2**level
        for top in range(0, window.height, side):
            for left in range(0, window.width, side):
                rows, columns = min(side, window.height - top), min(side, window.width - left)
                yield level, top, left, rows, columns


def seen_by_definition(window, y, x):
    """What an image query sees: (0, y', x') of a token, (level, top, left) of a cell.

    From the coarsest cells down, as the definition says it.
    """
    seen = []

    def visit(level, top, left):
        if top >= window.height or left >= window.width:
            return
        if level == 0:
            seen.append((0, top, left))
            return
        side = 2**level
        rows, columns = min(side, window.height - top), min(side, window.width - left)
        dy, dx = top + (rows - 1) / 2 - y, left + (columns - 1) / 2 - x
        if dy**2 + dx**2 < (window.radius * 2 ** (level - 1)) ** 2:
            for i in (0, 1):
                for j in (0, 1):
                    visit(level - 1, top + i * side // 2, left + j * side // 2)
        else:
            seen.append((level, top, left))

    side = 2**window.far_levels
    for top in range(0, window.height, side):
        for left in range(0, window.width, side):
            visit(window.far_levels, top, left)
    return seen


def far_mask_by_definition(window):
    """(text + image, text + image + cells) bool."""
    text, image = window.text_length, window.height * window.width
    place = {
        (0, y, x): text + y * window.width + x
        for y in range(window.height)
        for x in range(window.width)
    }
    for level, top, left, *_ in far_cells(window):
        place[level, top, left] = text + len(place)
    mask = torch.zeros(text + image, text + len(place), dtype=torch.bool)
    mask[:, :text] = True
    mask[:text, : text + image] = True
    for y in range(window.height):
        for x in range(window.width):
            keys = [place[key] for key in seen_by_definition(window, y, x)]
            mask[text + y * window.width + x, keys] = True
    return mask


def far_means_by_definition(tokens, key, window, scale, weight=None):
    """Every cell: the mean of its tokens (keys, or values), weighted by their keys' lengths.

    The weights are the softmax of scale * |key|^2. With a weight (levels, 2, 2), every token's is
    times 4 times those of all the cells it lies in below this one, by their places.
    """
    size = window.height, window.width
    image, keys = (x[:, window.text_length :].unflatten(1, size) for x in (tokens, key))
    logs = scale * (keys**2).sum(-1, keepdim=True)
    cells = []
    for level, top, left, rows, columns in far_cells(window):
        inside = slice(None), slice(top, top + rows), slice(left, left + columns)
        share = logs[inside].flatten(1, 2).softmax(1)
        if weight is not None:
            learned = torch.ones(rows, columns, dtype=tokens.dtype)
            for below in range(level):
                y, x = torch.arange(rows) >> below & 1, torch.arange(columns) >> below & 1
                learned = learned * 4 * weight[below][y[:, None], x]
            share = share * learned.flatten()[:, None, None]
        cells.append((image[inside].flatten(1, 2) * share).sum(1))
    return torch.stack(cells, dim=1)


def repeated(tokens, group):
    """(batch, tokens, heads, head_dim): every key head once for each query head that reads it."""
    return tokens.repeat_interleave(group, dim=2)


def far_attention_by_definition(q, k, v, window, scale, weight=None, offset=None, allowed=None):
    """As `attention_by_definition`, with far keys.

    Args:
        allowed: (1 or batch, 1, 1 or sequence, sequence) bool: no other tokens are attended to.
    """
    k, v = (repeated(x, q.shape[2] // x.shape[2]) for x in (k, v))
    mask = far_mask_by_definition(window)
    bias = torch.zeros(q.shape[2], mask.shape[1], dtype=torch.float64)
    cells = [(level, rows * columns) for level, _, _, rows, columns in far_cells(window)]
    of_cells = torch.tensor([count for _, count in cells], dtype=torch.float64).log()
    of_cells = of_cells.expand(q.shape[2], -1)
    if offset is not None:
        of_cells = of_cells + torch.stack([offset[level - 1] for level, _ in cells], dim=1)
    bias = torch.cat([bias[:, : -len(cells)], of_cells], dim=1).to(q.dtype)
    pooled = [far_means_by_definition(x, k, window, scale, weight) for x in (k, v)]
    k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), pooled, strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + bias[None, :, None]
    if allowed is not None:
        allowed = torch.nn.functional.pad(allowed, (0, len(cells)), value=True)
        mask = mask & allowed
    probability = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    probability = probability.nan_to_num(0.0)  # a padded query attends to nothing
    return torch.einsum("bhqk,bkhd->bqhd", probability, v)


def attention_by_definition(q, k, v, window, scale, weight=None, offset=None):
    """Masked softmax attention in the dtype of the inputs: the plain implementation.

    In float64 it is the oracle; in another dtype its error is the yardstick for that dtype.
    """
    if window.far_levels:
        return far_attention_by_definition(q, k, v, window, scale, weight, offset)
    k, v = (repeated(x, q.shape[2] // x.shape[2]) for x in (k, v))
    mask = mask_by_definition(window)
    if window.down_factor > 1:
        f = window.down_factor
        weight = torch.full((f, f), f**-2.0, dtype=q.dtype) if weight is None else weight
        weight = weight.reshape(f, f)
        pooled_k = pool_by_definition(k, window, weight)
        pooled_v = pool_by_definition(v, window, weight)
        k, v = torch.cat([k, pooled_k], dim=1), torch.cat([v, pooled_v], dim=1)
        pooled_mask = torch.ones(mask.shape[0], pooled_k.shape[1], dtype=torch.bool)
        pooled_mask[: window.text_length] = False
        mask = torch.cat([mask, pooled_mask], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if window.pooled_weight == "count":
        f = window.down_factor
        counts = [
            min(f, window.height - top) * min(f, window.width - left)
            for top in range(0, window.height, f)
            for left in range(0, window.width, f)
        ]
        scores[..., -len(counts) :] += torch.tensor(counts).log().to(scores.dtype)
    probability = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", probability, v)


def two_positions_by_definition(rotated, value, window, learned, scale, full=False, allowed=None):
    """Dense, in float64: which query and key score a pair is chosen pair by pair.

    Args:
        rotated: query and key, (batch, text + image, heads, head_dim) each, by true positions,
            then by scaled ones, the least scaled first.
        learned: spatial_weight and far_offset, where there are any.
        full: whether attention is full, and the window says only which pairs are near.
        allowed: (1 or batch, 1, 1 or sequence, sequence) bool: no other tokens are attended to.
    """
    learned = learned or {}
    group = rotated[0][0].shape[2] // value.shape[2]
    rotated = [(query.double(), repeated(key.double(), group)) for query, key in rotated]
    near, *between, far = rotated
    value, text = repeated(value.double(), group), window.text_length
    scores = torch.einsum("bqhd,bkhd->bhqk", *far) * scale
    if window.far_levels and not full:
        inside = far_mask_by_definition(window)
        cells = inside[:, len(inside) :]
        inside = inside[:, : len(inside)]
    else:
        inside = mask_by_definition(window)
    is_near = inside.clone()
    is_near[:text] = is_near[:, :text] = False
    true_scores = torch.einsum("bqhd,bkhd->bhqk", *near) * scale
    scores = torch.where(is_near, true_scores, scores)
    if not full:
        scores = scores.masked_fill(~inside, float("-inf"))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if window.far_levels and not full:
        weight = learned["spatial_weight"].double() if learned else None
        offset = learned.get("far_offset", torch.zeros(window.far_levels, value.shape[2])).double()
        # Near levels end within a quarter of the longer side, or less where there are more
        # positions; then each position has those that end within twice as far. The last has no end.
        most = max(window.height, window.width) / max(4, 2 ** (len(between) + 1))
        positions = torch.tensor(
            [
                next(
                    (
                        position
                        for position in range(len(between) + 1)
                        if level < window.far_levels
                        and window.radius * 2**level <= most * 2**position
                    ),
                    len(between) + 1,
                )
                for level, *_ in far_cells(window)
            ]
        )

        def scores_and_values(query, key):
            keys, values = (
                far_means_by_definition(x, key, window, scale, weight) for x in (key, value)
            )
            return torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale, values

        pooled, more = 0, 0
        for position, each in enumerate(rotated):
            own = positions == position
            scores_of, values_of = scores_and_values(*each)
            pooled, more = pooled + own * scores_of, more + own[:, None, None] * values_of
        bias = [
            offset[level - 1] + math.log(rows * columns)
            for level, _, _, rows, columns in far_cells(window)
        ]
        pooled = pooled + torch.stack(bias, dim=1)[:, None]
        pooled = pooled.masked_fill(~cells, float("-inf"))
        scores, value = torch.cat([scores, pooled], dim=-1), torch.cat([value, more], dim=1)
    if window.down_factor > 1:
        square = learned["spatial_weight"].double().reshape(window.down_factor, window.down_factor)
        key, more = (pool_by_definition(x, window, square) for x in (far[1], value))
        pooled = torch.einsum("bqhd,bkhd->bhqk", far[0], key) * scale
        pooled[:, :, :text] = float("-inf")
        scores, value = torch.cat([scores, pooled], dim=-1), torch.cat([value, more], dim=1)
    probability = scores.softmax(dim=-1).nan_to_num(0.0)  # a padded query attends to nothing
    return torch.einsum("bhqk,bkhd->bqhd", probability, value)


def relative_error(value, exact) -> float:
    """Norm of the difference over norm of the exact value."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))


def far_attention_within(query, key, value, start, window, allowed=None):
    """Attention of a sequence that has the image somewhere, with far keys, by the definition.

    Args:
        query, key, value: (batch, sequence, heads, head_dim).
        start: place of the image's first token. All others are treated as text.
        window: whose text is the other tokens.
        allowed: (1 or batch, 1, 1 or sequence, sequence) bool, see above.
    """
    image = window.height * window.width
    places = torch.arange(query.shape[1])
    inside = (places >= start) & (places < start + image)
    order = torch.cat([places[~inside], places[inside]])
    if allowed is not None:
        allowed = allowed[..., order]
        allowed = allowed if allowed.shape[-2] == 1 else allowed[..., order, :]
    ordered = [x[:, order] for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5
    out = far_attention_by_definition(*ordered, window, scale, allowed=allowed)
    return out[:, order.argsort()]
