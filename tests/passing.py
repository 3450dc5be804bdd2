"""A network of the operators that pass channels on one by one, for tests of what makes channels more."""

import numpy as np

from calib_nb.graph.build import network


def passing_network(rng):
    """A convolution, a PRelu and bounds with a value per channel, Resize, a depthwise layer, Clip, Reshape and Gemm."""
    text = """
        c = Conv (x, w)
        p = PRelu (c, slope)
        m = Max (p, floor)
        n = Min (m, top)
        r = Resize <mode = "nearest"> (n, , , sizes)
        d = Conv <group = 6, pads = [1, 1, 1, 1]> (r, v, vb)
        k = Clip (d, low, high)
        f = Reshape (k, flat)
        y = Gemm <transB = 1> (f, u)
    """
    weights = {"w": rng.normal(size=(6, 3, 1, 1)), "v": rng.normal(size=(6, 1, 3, 3)), "vb": rng.normal(size=6)}
    weights |= {"u": rng.normal(size=(4, 6 * 64)), "slope": rng.uniform(0.1, 0.3, (6, 1, 1)), "low": -1.0, "high": 2.0}
    weights |= {"floor": rng.uniform(-3, -2, (1, 6, 1, 1)), "top": rng.uniform(2, 3, (1, 6, 1, 1))}
    weights = {name: np.float32(value) for name, value in weights.items()}
    whole = {"sizes": np.array([1, 6, 8, 8]), "flat": np.array([1, 6 * 64])}
    return network(text.replace("\n        ", "\n"), inputs={"x": (1, 3, 4, 4)}, **weights, **whole)
