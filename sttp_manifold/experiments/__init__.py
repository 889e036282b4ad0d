"""The comparison: tasks, methods, records, tables, figures and one report.

Nothing here is needed to use the layers or the manifolds. :mod:`~sttp_manifold.experiments.methods`
and :mod:`~sttp_manifold.experiments.tasks` are the two places where something new is registered.
"""
