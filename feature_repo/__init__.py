"""The Feast repository: entities, sources, views, services, and how a written feature set is opened (`feature_repo.store`).

Importing the package costs nothing; the definition modules import Feast, `store` does so only when a store is opened.
"""
