"""Controls for notebooks: thin layers over the package's functions; no result depends on someone moving one.

pools = widgets.PoolExplorer(pool, scores=ranking)                     # then pools.names, pools.stack()
chooser = widgets.AdapterChooser(pool, chosen=["first-two-letters"])   # the same of a list, without a table
weights = widgets.WeightExplorer(base, stack, task)                    # then weights.weights, weights.adapter()
bench = widgets.MergeBench(base, pool, task)                           # then bench.trial, bench.adapter
units = widgets.UnitExplorer(pool)                                     # then units.clusters, units.selected
"""

from importlib import import_module

__all__ = ["AdapterChooser", "MergeBench", "PoolExplorer", "UnitExplorer", "WeightExplorer"]

_HOMES = {
    "AdapterChooser": "chooser",
    "MergeBench": "bench",
    "PoolExplorer": "explorer",
    "UnitExplorer": "units",
    "WeightExplorer": "weights",
}


def __getattr__(name: str):
    """Import ipywidgets and matplotlib only where a control is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
