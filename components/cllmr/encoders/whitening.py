"""Whitening of the text: a rival without learning that cannot collapse, whatever it is worth."""

from components.cllmr.encoders.pca import PCA


class Whitening(PCA):
    """Principal components, every one scaled to variance 1."""

    whiten = True
