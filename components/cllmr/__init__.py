"""The method: "Mitigating Propensity Bias of Large Language Models for Recommender Systems" (CLLMR, arXiv 2409.20052).

Equation numbers E1 to E18 in the docstrings of this package are those of the README's method section. Only torch and numpy
are imported here: no Ray, no pipeline, no feature store.
"""
