"""The demo world: draws a `Scene` at any size and aspect ratio.

Coordinates: x to the right and y down, in units of the shorter side, so that every shape keeps its
proportions. Positions are fractions of width and height, sizes are fractions of the shorter side.
All detail is a function of these coordinates; edges are smoothed over one pixel.
"""

from __future__ import annotations

import numpy as np

from clear_dit.demo.captions import Scene

Array = np.ndarray

BODY_RGB = {"white": (250, 250, 246), "golden": (255, 200, 30), "crimson": (205, 16, 44)}
OBJECT_RGB = {
    "blue": (32, 84, 226),
    "green": (16, 168, 72),
    "violet": (134, 48, 204),
    "pink": (255, 104, 176),
}
PLACE_X = {"left": 0.22, "middle": 0.5, "right": 0.78}
BODY_RADIUS = 0.12
OBJECT_HEIGHT = 0.38

_SKY_STOPS = {
    "day": ((52, 126, 214), (126, 184, 236), (206, 232, 246)),
    "sunset": ((70, 50, 120), (196, 104, 122), (255, 188, 104)),
    "night": ((7, 11, 34), (22, 32, 76), (58, 74, 124)),
}
_LAND_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.72, 0.66), "night": (0.36, 0.44, 0.68)}
_OBJECT_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.97, 0.9, 0.86), "night": (0.8, 0.82, 0.92)}


def _rgb(colour: tuple[float, ...]) -> Array:
    return np.asarray(colour, np.float32) / 255


def _smooth(edge0: float, edge1: float, value: Array) -> Array:
    t = np.clip((value - edge0) / (edge1 - edge0), 0, 1)
    return t * t * (3 - 2 * t)


def _generate(image: Array, alpha: Array, colour: Array) -> None:
    """Blend `colour` ((3,) or (H, W, 3)) into `image` (H, W, 3) by `alpha` (H, W), in place."""
    image += alpha[..., None] * (colour - image)


def _waves(rng: np.random.Generator, count: int, low: float, high: float) -> Array:
    """Random sinusoids: rows of (frequency in radians per unit, phase, amplitude of sum 1)."""
    frequency = np.exp(rng.uniform(np.log(low), np.log(high), count))
    amplitude = 1 / frequency
    phase = rng.uniform(0, 2 * np.pi, count)
    return np.stack([frequency, phase, amplitude / amplitude.sum()], 1).astype(np.float32)


def _sum_waves(waves: Array, position: Array) -> Array:
    return sum(a * np.sin(f * position + p) for f, p, a in waves)


class _Canvas:
    """An image under construction, and its coordinates.

    Attributes: image (H, W, 3) float32 in [0, 1]; x (1, W); y (H, 1); width, height, pixel: the
    extent of the image and of one pixel in units of the shorter side.
    """

    def __init__(self, height: int, width: int) -> None:
        unit = min(height, width)
        self.pixel = 1 / unit
        self.width, self.height = width / unit, height / unit
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / unit)[None, :]
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / unit)[:, None]
        self.image = np.zeros((height, width, 3), np.float32)

    def cover(self, distance: Array) -> Array:
        """Coverage in [0, 1] of the shape whose signed distance (negative inside) is given."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def window(self, x0: float, x1: float, y0: float, y1: float) -> _Canvas:
        """A view of the part between the given coordinates; drawing on it draws on this canvas."""
        view = object.__new__(_Canvas)
        columns = slice(*np.searchsorted(self.x[0], (x0, x1)))
        rows = slice(*np.searchsorted(self.y[:, 0], (y0, y1)))
        view.pixel, view.width, view.height = self.pixel, self.width, self.height
        view.x, view.y = self.x[:, columns], self.y[rows]
        view.image = self.image[rows, columns]
        return view


def _draw_sky(canvas: _Canvas, scene: Scene, rng: np.random.Generator, horizon: float) -> None:
    top, middle, bottom = (_rgb(c) for c in _SKY_STOPS[scene.sky])
    t = np.clip(canvas.y / horizon, 0, 1)[..., None]
    gradient = np.where(
        t < 0.5, top + (middle - top) * 2 * t, middle + (bottom - middle) * (2 * t - 1)
    )
    canvas.image[:] = gradient
    if scene.sky == "night":
        for _ in range(int(46 * canvas.width * canvas.height)):
            x, y = rng.uniform(0, canvas.width), rng.uniform(0, horizon)
            radius = rng.uniform(0.0022, 0.0052)
            part = canvas.window(x - 5 * radius, x + 5 * radius, y - 5 * radius, y + 5 * radius)
            square = (part.x - x) ** 2 + (part.y - y) ** 2
            glow = np.exp(-square / (radius * radius + 0.3 * canvas.pixel**2))
            _generate(part.image, glow * rng.uniform(0.55, 1), _rgb((236, 240, 255)))
    elif scene.sky == "sunset":
        rows, columns = _waves(rng, 3, 22, 60), _waves(rng, 3, 3, 9)
        streak = _sum_waves(
            rows, canvas.y * (1.6 - 0.6 * canvas.y) + 0.05 * _sum_waves(columns, canvas.x)
        )
        shape = streak + 0.55 * _sum_waves(columns, canvas.x + 0.6 * canvas.y)
        alpha = 0.62 * _smooth(0.25, 0.85, shape) * _smooth(0, 0.1, canvas.y)
        _generate(canvas.image, alpha, _rgb((255, 170, 128)))
    else:
        for _ in range(int(rng.integers(3, 6))):
            cx, cy = rng.uniform(0, canvas.width), rng.uniform(0.06, 0.78) * horizon
            size = rng.uniform(0.06, 0.1)
            part = canvas.window(cx - 3.4 * size, cx + 3.4 * size, cy - 1.6 * size, cy + 1.3 * size)
            density = np.zeros(part.image.shape[:2], np.float32)
            for dx, radius in zip(
                (-1.7, -0.8, 0.1, 0.9, 1.7), rng.uniform(0.55, 1.0, 5), strict=True
            ):
                radius *= size * (1.05 - 0.28 * abs(dx))
                lift = part.y - (cy - 0.42 * radius)
                square = ((part.x - cx - dx * size) / (1.25 * radius)) ** 2 + (lift / radius) ** 2
                density = np.maximum(density, 1 - square)
            base = _smooth(0.5 * size, 0.1 * size, part.y - cy)
            alpha = 0.92 * _smooth(0.0, 0.5, density) * base
            shade = np.clip((part.y - cy + 0.9 * size) / (1.4 * size), 0, 1)[..., None]
            white = _rgb((255, 255, 255)) * (1 - shade) + _rgb((196, 212, 232)) * shade
            _generate(part.image, alpha, white)


def _draw_body(canvas: _Canvas, scene: Scene, x: float, y: float) -> None:
    colour, radius = _rgb(BODY_RGB[scene.body_colour]), BODY_RADIUS
    part = canvas.window(x - 3.2 * radius, x + 3.2 * radius, y - 3.2 * radius, y + 3.2 * radius)
    dx, dy = part.x - x, part.y - y
    r = np.sqrt(dx * dx + dy * dy)
    fade = _smooth(3.2 * radius, radius, r)
    if scene.body == "sun":
        rays = 0.5 + 0.5 * np.cos(12 * np.arctan2(dy, dx))
        strength = 0.5 if scene.body_colour != "crimson" else 0.4
        _generate(
            part.image,
            fade**2 * (strength + 0.14 * rays * _smooth(1.0 * radius, 1.5 * radius, r)),
            colour,
        )
        edge = np.clip(r / radius, 0, 1)[..., None]
        core = colour + (1 - colour) * 0.22 * (1 - edge**2)
        _generate(part.image, canvas.cover(r - radius), core)
        return
    _generate(part.image, 0.22 * fade**2, colour)
    # The lit part of the moon: a disc without another disc, shifted up and to the right.
    bite = np.sqrt((dx - 0.48 * radius) ** 2 + (dy + 0.2 * radius) ** 2) - 0.82 * radius
    _generate(part.image, 0.14 * canvas.cover(r - radius), _rgb((40, 46, 78)))
    lit = canvas.cover(np.maximum(r - radius, -bite))
    craters = np.zeros_like(r)
    for cx, cy, size in (
        (-0.62, 0.1, 0.14),
        (-0.42, 0.55, 0.16),
        (-0.5, -0.38, 0.1),
        (0.1, 0.8, 0.1),
    ):
        craters += _smooth(size, 0.6 * size, np.hypot(dx / radius - cx, dy / radius - cy))
    _generate(part.image, lit, colour * (1 - 0.16 * np.clip(craters, 0, 1)[..., None]))


def _draw_hills(canvas: _Canvas, scene: Scene, rng: np.random.Generator, horizon: float) -> None:
    light = np.asarray(_LAND_LIGHT[scene.sky], np.float32)
    haze = _rgb(_SKY_STOPS[scene.sky][2])
    for layer, base in enumerate((-0.02, 0.075, 0.2)):
        waves = _waves(rng, 4, 4 + 2 * layer, 14)
        ridge = horizon + base * canvas.height + 0.05 * _sum_waves(waves, canvas.x)
        depth = canvas.y - ridge
        mist = (0.5, 0.22, 0.0)[layer]
        colour = _rgb(((92, 150, 96), (84, 160, 70), (66, 146, 48))[layer]) * light
        slope = 0.05 * sum(a * f * np.cos(f * canvas.x + p) for f, p, a in waves)
        rows = np.sin((70 - 14 * layer) * (depth + 0.16 * canvas.x) + 3 * slope)
        shade = 1.05 + 0.5 * slope + 0.06 * rows - 0.9 * np.clip(depth, 0, 0.3)
        tint = (colour * (1 - mist) + haze * mist) * shade[..., None]
        _generate(canvas.image, canvas.cover(-depth), tint)
        if layer == 2:
            continue
        # Conifers stand on the two far ridges.
        for _ in range(int((9, 7)[layer] * canvas.width)):
            x = rng.uniform(0, canvas.width)
            foot = (
                horizon
                + base * canvas.height
                + 0.05 * float(_sum_waves(waves, np.asarray(x, np.float32)))
            )
            tall = rng.uniform(0.035, 0.055) * (1, 1.5)[layer]
            foot += rng.uniform(0.004, 0.03)
            part = canvas.window(x - tall, x + tall, foot - 1.1 * tall, foot + 0.01)
            up = (foot - part.y) / tall
            tier = 0.30 * (1 - up) + 0.07 * (1 - np.mod(up * 3, 1)) * (1 - up)
            distance = np.maximum(np.abs(part.x - x) - tier * tall, np.maximum(-up, up - 1) * tall)
            leaf = _rgb((30, 92, 58)) * light * (1 - mist) + haze * mist
            side = 1 - 0.25 * (part.x > x)
            _generate(
                part.image,
                canvas.cover(distance),
                leaf * np.broadcast_to(side[..., None], part.image.shape),
            )


def _draw_sea(
    canvas: _Canvas, scene: Scene, rng: np.random.Generator, horizon: float, body_x: float
) -> None:
    light = np.asarray(_LAND_LIGHT[scene.sky], np.float32)
    depth = canvas.y - horizon
    t = np.clip(depth / (canvas.height - horizon), 0, 1)
    far, near = _rgb((92, 176, 206)), _rgb((14, 92, 140))
    _, high, low = (_rgb(c) for c in _SKY_STOPS[scene.sky])
    water = (far + (near - far) * t[..., None] ** 0.8) * light * 0.62
    water = water + 0.38 * (low + (high - low) * np.sqrt(t)[..., None])
    # Perspective: a row at depth d is seen at distance ~1/d, so waves crowd near the horizon.
    distance = 0.9 * np.log(np.clip(depth, 0, None) + 0.035)
    waves = _waves(rng, 3, 30, 52)
    across = _waves(rng, 3, 5, 16)
    ripple = _sum_waves(waves, distance + 0.1 * _sum_waves(across, canvas.x / (0.35 + depth)))
    chop = ripple * (0.4 + 0.6 * np.sin(9 * canvas.x / (0.4 + depth) + across[0, 1]) ** 2)
    water = water * (1 + 0.3 * chop[..., None])
    body = _rgb(BODY_RGB[scene.body_colour])
    width = 0.05 + 0.16 * t
    path = np.exp(-(((canvas.x - body_x) / width) ** 2)) * (
        0.35 + 0.65 * _smooth(-0.1, 0.5, ripple)
    )
    inside = canvas.cover(-depth)
    strength = 0.75 if scene.body == "sun" else 0.5
    water += (strength * path * (1 - 0.45 * t))[..., None] * (body - water)
    _generate(canvas.image, inside + np.zeros_like(canvas.x), water)


def _draw_desert(canvas: _Canvas, scene: Scene, rng: np.random.Generator, horizon: float) -> None:
    light = np.asarray(_LAND_LIGHT[scene.sky], np.float32)
    haze = _rgb(_SKY_STOPS[scene.sky][2])
    for layer, base in enumerate((0.0, 0.08, 0.19)):
        period = (0.42, 0.62, 0.9)[layer] * rng.uniform(0.9, 1.1)
        phase = rng.uniform(0, 1)
        # A skewed triangle wave: long windward slopes, short lee slopes.
        u = np.mod(canvas.x / period + phase, 1)
        crest = np.where(u < 0.68, u / 0.68, (1 - u) / 0.32)
        crest = crest * crest * (3 - 2 * crest)
        ridge = horizon + base * canvas.height + 0.03 - (0.05 + 0.02 * layer) * crest
        depth = canvas.y - ridge
        # The lee side lies in shadow; its border runs down from the crest.
        border = u - 0.68 + 0.55 * np.clip(depth, 0, 0.3) * np.sin(9 * depth + 2)
        lee = _smooth(-0.015, 0.03, border) * _smooth(1.0, 0.8, u) * _smooth(0.2, 0.02, depth)
        sway = 0.02 * np.sin(11 * canvas.x + 2 * np.pi * phase)
        ripple = np.sin((150 - 40 * layer) * (depth + sway + 0.12 * canvas.x))
        shade = 1.04 - 0.3 * lee + 0.055 * ripple * (1 - lee) - 0.5 * np.clip(depth, 0, 0.3)
        mist = (0.32, 0.14, 0.0)[layer]
        sand = _rgb(((238, 202, 146), (232, 186, 118), (224, 170, 98))[layer]) * light
        _generate(
            canvas.image, canvas.cover(-depth), (sand * (1 - mist) + haze * mist) * shade[..., None]
        )


def _box(x: Array, y: Array, cx: float, cy: float, half_x: float | Array, half_y: float) -> Array:
    return np.maximum(np.abs(x - cx) - half_x, np.abs(y - cy) - half_y)


def _draw_house(c: _Canvas, hue: Array, light: Array, lamp: Array, x: float, base: float) -> None:
    tall = OBJECT_HEIGHT
    half, eaves = 0.46 * tall, base - 0.56 * tall
    wall = hue * (1.0 - 0.16 * _smooth(x - half, x + half, c.x)[..., None])
    boards = 1 - 0.10 * _smooth(0.75, 0.95, np.mod((base - c.y) / (0.075 * tall), 1))[..., None]
    _generate(
        c.image,
        c.cover(_box(c.x, c.y, x, (base + eaves) / 2, half, (base - eaves) / 2)),
        wall * boards,
    )
    slope = (eaves - c.y) / (0.44 * tall)
    chimney = _box(c.x, c.y, x + 0.26 * tall, eaves - 0.28 * tall, 0.055 * tall, 0.13 * tall)
    _generate(c.image, c.cover(chimney), 0.5 * hue * np.ones(3, np.float32))
    roof = np.maximum(
        (np.abs(c.x - x) - 1.2 * half * (1 - slope)) * 0.62,
        np.maximum(-slope, slope - 1) * 0.4 * tall,
    )
    tiles = 1 - 0.16 * (
        np.sin(slope * 44) * 0.5 + 0.5 * np.sin(c.x * 190 + 3 * np.floor(slope * 7))
    )
    _generate(c.image, c.cover(roof), 0.58 * hue * tiles[..., None])
    for side in (-0.58, 0.58):
        cx, cy = x + side * half, base - 0.34 * tall
        _generate(
            c.image,
            c.cover(_box(c.x, c.y, cx, cy, 0.1 * tall, 0.1 * tall)),
            _rgb((250, 246, 236)) * light,
        )
        pane = np.minimum(np.abs(c.x - cx), np.abs(c.y - cy)) - 0.008 * tall
        glass = np.maximum(_box(c.x, c.y, cx, cy, 0.082 * tall, 0.082 * tall), -pane)
        _generate(c.image, c.cover(glass), lamp)
    door = _box(c.x, c.y, x, base - 0.18 * tall, 0.085 * tall, 0.18 * tall)
    _generate(c.image, c.cover(door), _rgb((92, 58, 40)) * light)
    knob = np.hypot(c.x - x - 0.05 * tall, c.y - base + 0.17 * tall) - 0.014 * tall
    _generate(c.image, c.cover(knob), _rgb((240, 210, 110)) * light)


def _draw_tree(c: _Canvas, hue: Array, light: Array, seed: int, x: float, base: float) -> None:
    tall = OBJECT_HEIGHT
    up = np.clip((base - c.y) / tall, 0, 1)
    trunk = np.abs(c.x - x) - tall * (0.055 + 0.06 * (1 - np.clip(up * 4, 0, 1)) ** 2)
    trunk = np.maximum(trunk, np.maximum(c.y - base, base - 0.55 * tall - c.y))
    bark = 0.86 + 0.14 * np.sin(260 * (c.x - x) + 8 * np.sin(30 * c.y))
    _generate(c.image, c.cover(trunk), _rgb((112, 74, 46)) * light * bark[..., None])
    rng = np.random.default_rng(seed)
    centre = base - 0.66 * tall
    # Leafy blobs from the back to the front, each lit from above.
    blobs = [
        (0.0, 0.0, 0.30),
        (-0.24, 0.1, 0.19),
        (0.24, 0.1, 0.19),
        (-0.15, -0.14, 0.2),
        (0.15, -0.14, 0.2),
    ]
    blobs += [(rng.uniform(-0.18, 0.18), rng.uniform(-0.12, 0.12), 0.12) for _ in range(5)]
    for bx, by, size in blobs:
        dx, dy = (c.x - x - bx * tall) / (size * tall), (c.y - centre - by * tall) / (size * tall)
        angle = np.arctan2(dy, dx)
        edge = 1 + 0.05 * np.sin(11 * angle + 20 * bx) + 0.03 * np.sin(23 * angle)
        distance = (np.sqrt(dx * dx + dy * dy) - edge) * size * tall
        lit = np.clip(0.84 - 0.24 * dy - 0.1 * dx, 0.5, 1.15)
        leaves = 0.07 * np.sin(150 * (c.x + 0.4 * c.y)) * np.sin(150 * (c.y - 0.4 * c.x))
        _generate(c.image, c.cover(distance), np.clip(hue * (lit + leaves)[..., None], 0, 1))


def _draw_tower(c: _Canvas, hue: Array, light: Array, lamp: Array, x: float, base: float) -> None:
    tall = OBJECT_HEIGHT * 1.08
    up = np.clip((base - c.y) / tall, -0.1, 1.2)
    half = tall * (0.19 - 0.075 * up)
    across = (c.x - x) / half
    rounded = np.clip(1.04 - 0.36 * np.clip(across, -1, 1) ** 2 - 0.12 * across, 0.4, 1.1)
    joints = np.mod(up * 22, 1)
    bricks = np.mod(across * 3 + 0.5 * np.mod(np.floor(up * 22), 2), 1)
    mortar = 1 - 0.13 * np.maximum(_smooth(0.8, 0.95, joints), _smooth(0.88, 0.97, bricks))
    body = np.maximum(np.abs(c.x - x) - half, np.maximum(-up, up - 0.74) * tall)
    _generate(c.image, c.cover(body), np.clip(hue * (rounded * mortar)[..., None], 0, 1))
    gallery = _box(c.x, c.y, x, base - 0.75 * tall, 0.19 * tall, 0.022 * tall)
    _generate(c.image, c.cover(gallery), 0.55 * hue * np.ones(3, np.float32))
    _generate(c.image, c.cover(_box(c.x, c.y, x, base - 0.8 * tall, 0.1 * tall, 0.04 * tall)), lamp)
    roof_up = (base - 0.84 * tall - c.y) / (0.16 * tall)
    roof = np.maximum(
        (np.abs(c.x - x) - 0.17 * tall * (1 - roof_up)) * 0.7,
        np.maximum(-roof_up, roof_up - 1) * 0.16 * tall,
    )
    _generate(c.image, c.cover(roof), 0.7 * hue * np.clip(1 - across * 0.2, 0.6, 1.2)[..., None])
    for level in (0.3, 0.55):
        cy = base - level * tall
        arch = np.minimum(
            _box(c.x, c.y, x, cy, 0.036 * tall, 0.04 * tall),
            np.hypot(c.x - x, c.y - cy + 0.04 * tall) - 0.036 * tall,
        )
        _generate(c.image, c.cover(arch), lamp)
    door = np.minimum(
        _box(c.x, c.y, x, base - 0.06 * tall, 0.06 * tall, 0.06 * tall),
        np.hypot(c.x - x, c.y - base + 0.12 * tall) - 0.06 * tall,
    )
    _generate(c.image, c.cover(np.maximum(door, c.y - base)), _rgb((80, 52, 40)) * light)


def _draw_balloon(c: _Canvas, hue: Array, light: Array, x: float, base: float) -> None:
    tall = OBJECT_HEIGHT * 1.06
    foot = base - 0.04
    radius, centre = 0.37 * tall, foot - 0.64 * tall
    down = (c.y - centre) / radius
    # A ball above its equator that tapers to the mouth below it.
    width = np.where(
        down < 0.3,
        np.sqrt(np.clip(1 - down * down, 0, 1)),
        np.clip(0.954 - 0.55 * (down - 0.3) - 0.19 * (down - 0.3) ** 2, 0, 1),
    )
    across = (c.x - x) / (radius * np.maximum(width, 0.05))
    ball = np.sqrt((c.x - x) ** 2 + (c.y - centre) ** 2) - radius
    cone = np.maximum((np.abs(c.x - x) - radius * width) * 0.85, (down - 1.28) * radius)
    envelope = np.where(down < 0.3, ball, cone)
    gore = np.sin(4 * np.arcsin(np.clip(across, -1, 1)) + np.pi / 2)
    shine = 0.95 - 0.22 * across - 0.34 * np.clip(across, -1, 1) ** 2 - 0.12 * down
    for sign in (-1.0, 1.0):
        rope = np.maximum(
            np.abs(
                c.x - x - sign * tall * (0.07 + 0.07 * (foot - 0.13 * tall - c.y) / (0.12 * tall))
            )
            - 0.004,
            np.maximum(c.y - foot + 0.1 * tall, foot - 0.26 * tall - c.y),
        )
        _generate(c.image, 0.9 * c.cover(rope), _rgb((70, 52, 40)) * light)
    stripes = np.clip(hue * (shine * (0.92 + 0.16 * gore))[..., None], 0, 1)
    _generate(c.image, c.cover(envelope), stripes)
    band = np.maximum(envelope, np.abs(down - 0.05) - 0.09)
    _generate(
        c.image,
        c.cover(band),
        np.clip(hue + 0.55 * (1 - hue), 0, 1) * np.clip(shine, 0.5, 1)[..., None],
    )
    basket = _box(c.x, c.y, x, foot - 0.06 * tall, 0.085 * tall, 0.065 * tall)
    weave = 0.85 + 0.15 * np.sin(230 * c.x) * np.sin(230 * c.y)
    _generate(c.image, c.cover(basket), _rgb((150, 100, 58)) * light * weave[..., None])


def _draw_object(canvas: _Canvas, scene: Scene, seed: int, x: float, base: float) -> None:
    light = np.asarray(_OBJECT_LIGHT[scene.sky], np.float32)
    hue = _rgb(OBJECT_RGB[scene.object_colour]) * light
    lamp = _rgb((70, 92, 120) if scene.sky == "day" else (255, 214, 120))
    if scene.object != "balloon":
        ground = canvas.window(x - 0.4, x + 0.4, base - 0.08, base + 0.08)
        ellipse = np.sqrt(((ground.x - x) / 0.27) ** 2 + ((ground.y - base - 0.004) / 0.042) ** 2)
        if scene.land == "sea":
            sand = _rgb((226, 196, 138)) * np.asarray(_LAND_LIGHT[scene.sky], np.float32) ** 0.7
            foam = _smooth(1.22, 1.08, ellipse) * (0.55 + 0.25 * np.sin(60 * ground.x))
            _generate(ground.image, 0.6 * foam, _rgb((236, 246, 250)) * light)
            _generate(
                ground.image, _smooth(1.06, 1.0, ellipse), sand * (1.05 - 0.25 * ellipse[..., None])
            )
        else:
            _generate(ground.image, 0.45 * _smooth(1.15, 0.45, ellipse), np.zeros(3, np.float32))
    else:
        ground = canvas.window(x - 0.4, x + 0.4, base, base + 0.1)
        ellipse = np.sqrt(((ground.x - x) / 0.15) ** 2 + ((ground.y - base - 0.05) / 0.03) ** 2)
        _generate(ground.image, 0.35 * _smooth(1.2, 0.3, ellipse), np.zeros(3, np.float32))
    part = canvas.window(x - 0.28, x + 0.28, base - 0.46, base + 0.02)
    if scene.object == "house":
        _draw_house(part, hue, light, lamp, x, base)
    elif scene.object == "tree":
        _draw_tree(part, hue, light, seed, x, base)
    elif scene.object == "tower":
        _draw_tower(part, hue, light, lamp, x, base)
    else:
        _draw_balloon(part, hue, light, x, base)


def render(scene: Scene, height: int, width: int) -> Array:
    """Generate `scene`: an array [height, width, 3] of uint8, the same at every call."""
    if min(height, width) < 16:
        raise ValueError(f"render needs at least 16 pixels a side; got {height}x{width}")
    rng = np.random.default_rng(scene.seed)
    canvas = _Canvas(height, width)
    horizon = canvas.height * (0.565 + rng.uniform(-0.02, 0.02))
    body_x = canvas.width * (PLACE_X[scene.place] + rng.uniform(-0.04, 0.04))
    body_y = canvas.height * (0.215 + rng.uniform(-0.03, 0.03))
    object_x = canvas.width * (0.5 + rng.uniform(-0.13, 0.13))
    object_base = canvas.height * (0.885 + rng.uniform(-0.02, 0.02))
    _draw_sky(canvas, scene, rng, horizon)
    _draw_body(canvas, scene, body_x, body_y)
    if scene.land == "hills":
        _draw_hills(canvas, scene, rng, horizon)
    elif scene.land == "sea":
        _draw_sea(canvas, scene, rng, horizon, body_x)
    else:
        _draw_desert(canvas, scene, rng, horizon)
    _draw_object(canvas, scene, int(rng.integers(2**31)), object_x, object_base)
    return (np.clip(canvas.image, 0, 1) * 255 + 0.5).astype(np.uint8)
