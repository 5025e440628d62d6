"""Small ICC profiles (ICC.1:2001-04), and what the colours they describe are in sRGB."""

import struct

import numpy as np

# D50 colourants, as columns.
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
ADOBE_GAMMA = 2.19921875
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
_SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
_WHITE = np.array([0.9642, 1.0, 0.8249])


def rgb_profile(colourants=ADOBE, gamma=ADOBE_GAMMA):
    tags = {
        name: _xyz(xyz) for name, xyz in zip(("rXYZ", "gXYZ", "bXYZ"), colourants.T, strict=True)
    }
    tags |= dict.fromkeys(("rTRC", "gTRC", "bTRC"), _gamma(gamma))
    return _profile("RGB ", "XYZ ", tags)


def grey_profile(gamma):
    return _profile("GRAY", "XYZ ", {"kTRC": _gamma(gamma)})


def cmyk_profile(cyan_lab):
    """Black ink is black, cyan is one of Lab; the other inks cannot be seen."""
    corners = [
        (0, 0, 0) if corner & 1 else cyan_lab if corner & 8 else (100, 0, 0) for corner in range(16)
    ]
    lab = [(round(L * 2.55), round(a) + 128, round(b) + 128) for L, a, b in corners]
    table = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0)
    table += struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int).tolist())
    table += bytes(range(256)) * 4 + bytes(np.ravel(lab).tolist()) + bytes(range(256)) * 3
    return _profile("CMYK", "Lab ", {"A2B0": table})


def srgb_of(values, colourants=ADOBE, gamma=ADOBE_GAMMA):
    """uint8 of an RGB profile as sRGB, float from 0 to 255."""
    return srgb_of_xyz((values / 255.0) ** gamma @ colourants.T)


def srgb_of_lab(lab):
    f = np.array([lab[1] / 500, 0, -lab[2] / 200]) + (lab[0] + 16) / 116
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    return srgb_of_xyz(xyz)


def srgb_of_xyz(xyz):
    return encoded((xyz @ np.linalg.inv(_SRGB).T).clip(0, 1))


def linear(values):
    """The inverse of `encoded`."""
    unit = np.asarray(values) / 255
    return np.where(unit > 0.04045, ((unit + 0.055) / 1.055) ** 2.4, unit / 12.92)


def encoded(linear):
    """Light from 0 to 1 as sRGB from 0 to 255."""
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _profile(space, connection, tags):
    tags = {"wtpt": _xyz(_WHITE), "cprt": b"text\0\0\0\0free\0", "desc": _description()} | tags
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s28sI", *(at + len(body), b"", 0x02400000, b"prtr", space.encode()),
        *(connection.encode(), bytes(12), b"acsp", b"", 0),
    )  # fmt: skip
    header += struct.pack(">3i", *(round(65536 * value) for value in _WHITE))
    return header.ljust(128, b"\0") + table + body


def _xyz(values):
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(65536 * value) for value in values))


def _gamma(gamma):
    return struct.pack(">4sIIH", b"curv", 0, 1, round(256 * gamma))


def _description():
    return struct.pack(">4sII5s", b"desc", 0, 5, b"test") + bytes(78)
