"""Several tagger files in one table: what is equal must come out equal, whatever the order of the rows."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.tags.coco import TagSet
from calib_nb.tags.evaluate import TagEvaluation
from calib_nb.tags.metrics import average_precision, tag_map
from calib_nb.tags.table import changed_images, class_drops, map_drop


def evaluation(scores, targets):
    names = [f"c{k}" for k in range(targets.shape[1])]
    units = pd.DataFrame(
        np.hstack([scores, targets]), columns=[f"{kind}_{c}" for kind in ("score", "target") for c in names]
    )
    per_class = pd.DataFrame(
        {"category": names, "average_precision": average_precision(scores, targets), "photos": targets.sum(0)}
    )
    counts = {"photos": len(scores), "scored": len(scores), "threshold": 0.5}
    tables = {"rates": pd.DataFrame(), "curve": pd.DataFrame(), "per_class": per_class, "units": units}
    times = {"size_mb": 1.0, "latency_ms": 1.0, "latency_iqr_ms": 0.0}
    return TagEvaluation(map=tag_map(scores, targets), **counts, **tables, **times)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(5, 40), st.integers(1, 6))
def test_drops_are_of_the_same_images(seed, photos, classes):
    rng = np.random.default_rng(seed)
    targets = (rng.random((photos, classes)) < 0.5).astype(float)
    targets[0] = 1
    first, second = (evaluation(rng.standard_normal((photos, classes)) + targets, targets) for _ in range(2))
    assert map_drop(first, first, bootstrap=20) == map_drop(second, second, bootstrap=20)  # nothing, with no width
    there, back = map_drop(first, second, bootstrap=20), map_drop(second, first, bootstrap=20)
    assert np.allclose([there.value, there.low, there.high], [-back.value, -back.high, -back.low])
    assert np.isclose(class_drops(first, second)["drop"].mean(), there.value)
    tags = TagSet(pd.DataFrame({"path": [f"{k}.jpg" for k in range(photos)]}), pd.DataFrame())
    moved = changed_images(first, second, tags)
    said, says = (e.units.iloc[:, :classes].to_numpy() > 0 for e in (first, second))
    assert sum(len(t.split(", ")) for t in [*moved.lost, *moved.won] if t) == (said != says).sum()
    wrong = ((says != said) & (said == (targets > 0))).sum()
    assert moved.lost.str.count("!").sum() + moved.won.str.count("!").sum() == wrong
