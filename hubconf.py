"""Entry points for torch.hub: `torch.hub.load(".", "edgeface_xxs", source="local", checkpoint="edgeface_xxs.pt")`."""

dependencies = ["torch", "numpy", "pandas", "platformdirs"]


def _edgeface(variant, checkpoint, seed):
    from calib_nb.faces.edgeface import edgeface, load_edgeface

    return edgeface(variant, seed=seed).eval() if checkpoint is None else load_edgeface(checkpoint, variant)


def edgeface_xxs(checkpoint=None, *, seed=0):
    """EdgeFace-XXS.

    Takes RGB images, float [N,3,112,112] in [-1, 1]; gives embeddings [N,512].
    Weights come from a `checkpoint` file (float, or edgeface_xxs_q.pt); without one they are random.
    """
    return _edgeface("edgeface_xxs", checkpoint, seed)


def edgeface_xs(checkpoint=None, *, seed=0):
    """EdgeFace-XS with plain Linear layers, the network of edgeface_xs_q.pt.

    Takes RGB images, float [N,3,112,112] in [-1, 1]; gives embeddings [N,512].
    Weights come from a `checkpoint` file; without one they are random.
    """
    return _edgeface("edgeface_xs", checkpoint, seed)


def edgeface_xs_gamma_06(checkpoint=None, *, seed=0):
    """EdgeFace-XS with low-rank Linear layers (0.6).

    Takes RGB images, float [N,3,112,112] in [-1, 1]; gives embeddings [N,512].
    Weights come from a `checkpoint` file; without one they are random.
    """
    return _edgeface("edgeface_xs_gamma_06", checkpoint, seed)


def edgeface_s_gamma_05(checkpoint=None, *, seed=0):
    """EdgeFace-S with low-rank Linear layers (0.5).

    Takes RGB images, float [N,3,112,112] in [-1, 1]; gives embeddings [N,512].
    Weights come from a `checkpoint` file; without one they are random.
    """
    return _edgeface("edgeface_s_gamma_05", checkpoint, seed)


def edgeface_base(checkpoint=None, *, seed=0):
    """EdgeFace-Base.

    Takes RGB images, float [N,3,112,112] in [-1, 1]; gives embeddings [N,512].
    Weights come from a `checkpoint` file; without one they are random.
    """
    return _edgeface("edgeface_base", checkpoint, seed)
