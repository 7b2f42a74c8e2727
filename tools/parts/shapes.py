"""Draw one bright shape on a dim, smooth background: the world of the demo's stills and videos.

How: every shape is a polygon, turned once into a table of signed distances; a picture looks each of
its pixels up in that table after undoing the shape's place, size and angle, so the edge comes out
anti-aliased and a batch of pictures is a dozen numpy operations, whatever the shapes.
Shapes are bright and backgrounds dim on purpose: with both equally bright a small model learned
nothing in the minutes the demo has. No shape has a rotational symmetry and each has a white tip, so
that every angle looks different from every other (without the tip it stayed unread: orientation
was at chance after 800 steps of pretraining).
Cost: about 0.1 ms for a picture of 48 x 48 pixels on one core.

Every random choice comes from `generator(*key)`: a pure function of the key's integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

SHAPES = ("arrow", "dart", "drop", "dome", "hook", "heart")
TEXTURES = ("plain", "striped", "spotted")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 50, 50),
    "orange": (255, 145, 20),
    "yellow": (250, 240, 40),
    "green": (50, 225, 60),
    "cyan": (50, 230, 235),
    "blue": (70, 110, 255),
    "magenta": (245, 70, 225),
}
RADIUS_RANGE = (0.14, 0.42)
"""Smallest and largest circle around a shape, as a fraction of the picture's side."""

_TABLE_SIDE = 256  # cells along one side of a distance table
_TABLE_REACH = 1.5  # the table covers [-reach, reach], in units of the shape's radius
_TIP_BEGINS = -0.25  # in radii, from the centre towards where the shape points
_WHITE = np.float32(250.0)
_BACKGROUND_GRID = 3  # background colours are drawn on a 3 x 3 grid and interpolated
_BACKGROUND_BRIGHTEST = 90.0  # of 255; the dimmest shape colour is about twice as bright


@dataclass(frozen=True)
class Scenes:
    """What n pictures show; every field has n rows."""

    shape: Ints
    """[n], index into SHAPES."""
    colour: Floats
    """[n, 3], RGB, 0 to 255."""
    texture: Ints
    """[n], index into TEXTURES."""
    texture_phase: Floats
    """[n], 0 to 1: where stripes and spots begin."""
    background: Floats
    """[n, 3, 3, 3], grid rows, grid columns, RGB 0 to 255."""
    x: Floats
    """[n], centre, 0 (left edge) to 1 (right edge)."""
    y: Floats
    """[n], centre, 0 (top edge) to 1 (bottom edge)."""
    radius: Floats
    """[n], of the circle around the shape, as a fraction of the picture's side."""
    angle: Floats
    """[n], degrees clockwise; 0 points up."""


def generator(*key: int) -> np.random.Generator:
    """A counter-based random generator that depends on the key's integers and nothing else."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def random_looks(rng: np.random.Generator, n: int) -> dict[str, NDArray]:
    """Colour, texture and background of n scenes: the fields of Scenes without shape or geometry."""
    return {
        "colour": jitter_colours(rng, rng.integers(len(COLOURS), size=n)),
        "texture": rng.integers(len(TEXTURES), size=n),
        "texture_phase": rng.random(n, dtype=np.float32),
        "background": random_backgrounds(rng, n),
    }


def jitter_colours(rng: np.random.Generator, colour_index: Ints) -> Floats:
    """RGB [n, 3] near the named colours `colour_index` [n] (indices into COLOURS)."""
    named = np.array(list(COLOURS.values()), np.float32)[colour_index]
    brightness = rng.uniform(0.8, 1.0, (len(named), 1))
    shifted = named * brightness + rng.uniform(-15, 15, named.shape)
    return np.clip(shifted, 0, 255).astype(np.float32)


def random_backgrounds(rng: np.random.Generator, n: int) -> Floats:
    """Dim colours on a coarse grid, [n, 3, 3, 3]."""
    brightest = rng.uniform(0.2, 1.0, (n, 1, 1, 1)) * _BACKGROUND_BRIGHTEST
    grid = rng.random((n, _BACKGROUND_GRID, _BACKGROUND_GRID, 3))
    return (grid * brightest).astype(np.float32)


def draw(scenes: Scenes, size: int) -> NDArray[np.uint8]:
    """Pictures of `scenes`, uint8 RGB [n, size, size, 3]."""
    along = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx = along[None, None, :] - scenes.x[:, None, None]
    dy = along[None, :, None] - scenes.y[:, None, None]
    radians = np.deg2rad(scenes.angle).astype(np.float32)
    cos = (np.cos(radians) / scenes.radius)[:, None, None]
    sin = (np.sin(radians) / scenes.radius)[:, None, None]
    u = dx * cos + dy * sin
    v = dy * cos - dx * sin
    distance = _lookup_distance(scenes.shape, u, v)
    coverage = np.clip(0.5 - distance * (scenes.radius * size)[:, None, None], 0.0, 1.0)
    background = _upsample(scenes.background, along)
    paint = scenes.colour[:, None, None, :] * _shade(scenes, u, v)[..., None]
    whiteness = np.clip(0.5 - (v - _TIP_BEGINS) * (scenes.radius * size)[:, None, None], 0.0, 1.0)
    paint = paint + whiteness[..., None] * (_WHITE - paint)
    picture = background + coverage[..., None] * (paint - background)
    return (picture + 0.5).astype(np.uint8)


def _lookup_distance(shape: Ints, u: Floats, v: Floats) -> Floats:
    """Signed distance to the outline, in radii, at shape coordinates u, v [n, h, w]."""
    scale = _TABLE_SIDE / (2 * _TABLE_REACH)
    column = np.clip(((u + _TABLE_REACH) * scale).astype(np.int32), 0, _TABLE_SIDE - 1)
    row = np.clip(((v + _TABLE_REACH) * scale).astype(np.int32), 0, _TABLE_SIDE - 1)
    first = (shape * _TABLE_SIDE * _TABLE_SIDE).astype(np.int32)[:, None, None]
    return _distance_tables().ravel().take(first + row * _TABLE_SIDE + column)


def _shade(scenes: Scenes, u: Floats, v: Floats) -> Floats:
    """Brightness factor of the shape's texture, fixed to the shape, [n, h, w] in 0.65 to 1."""
    phase = scenes.texture_phase[:, None, None]
    stripes = np.sin(2 * np.pi * (1.5 * v + phase))
    kind = scenes.texture[:, None, None]
    pattern = np.where(kind == 2, stripes * np.cos(3 * np.pi * u), stripes)
    return np.where(kind == 0, np.float32(1.0), 0.825 + 0.175 * pattern).astype(np.float32)


def _upsample(grid: Floats, along: Floats) -> Floats:
    """Bilinear interpolation of [n, g, g, 3] at the relative positions `along` [size], both ways."""
    cells = grid.shape[1] - 1
    weights = np.maximum(0.0, 1.0 - np.abs(along[:, None] * cells - np.arange(cells + 1)))
    weights = weights.astype(np.float32)
    return np.einsum("hr,nrcd,wc->nhwd", weights, grid, weights, optimize=True)


@lru_cache(maxsize=1)
def _distance_tables() -> Floats:
    """Signed distance to each shape's outline, in radii, negative inside, [shapes, side, side]."""
    along = ((np.arange(_TABLE_SIDE) + 0.5) / _TABLE_SIDE * 2 - 1) * _TABLE_REACH
    points = np.stack(np.meshgrid(along, along), axis=-1)
    tables = [_polygon_distance(_outline(name), points) for name in SHAPES]
    return np.stack(tables).astype(np.float32)


def _polygon_distance(corners: NDArray, points: NDArray) -> NDArray:
    """Signed distance of points [..., 2] to the closed polygon `corners` [k, 2]."""
    nearest = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, offset = b - a, points - a
        t = np.clip(offset @ edge / (edge @ edge), 0.0, 1.0)
        nearest = np.minimum(nearest, np.linalg.norm(offset - t[..., None] * edge, axis=-1))
        straddles = (a[1] > points[..., 1]) != (b[1] > points[..., 1])
        side = offset[..., 0] * edge[1] - offset[..., 1] * edge[0]
        inside ^= straddles & ((side < 0) == (edge[1] > 0))
    return np.where(inside, -nearest, nearest)


def _outline(name: str) -> NDArray:
    """Corners [k, 2] of a shape that points up (y grows downwards), within the unit circle."""
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    arch = np.linspace(np.pi, 2 * np.pi, 17)
    outlines = {
        "arrow": [(0, -1), (0.8, 0), (0.33, 0), (0.33, 0.9), (-0.33, 0.9), (-0.33, 0), (-0.8, 0)],
        "dart": [(0, -1), (0.72, 0.7), (0, 0.3), (-0.72, 0.7)],
        "drop": np.stack([0.85 * np.sin(turn) * np.sin(turn / 2) ** 2, -np.cos(turn)], axis=1),
        "dome": np.stack([0.9 * np.cos(arch), 0.45 + 0.9 * np.sin(arch)], axis=1),
        "hook": [(-0.6, -0.8), (-0.1, -0.8), (-0.1, 0.3), (0.6, 0.3), (0.6, 0.8), (-0.6, 0.8)],
        "heart": np.stack([0.95 * np.sin(turn) ** 3, 0.06 * _heart_height(turn)], axis=1),
    }
    return np.asarray(outlines[name], float)


def _heart_height(turn: NDArray) -> NDArray:
    """Height of the heart curve, its notch pointing up."""
    return -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
