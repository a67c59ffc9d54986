"""The controls of an explorer of units: what is picked, LEGO's options, and settings that outlive a cell's run."""

from __future__ import annotations

import ipywidgets

from workbench.canonical import CANONICAL
from workbench.errors import MergeError
from workbench.stack import Stack
from workbench.widgets.merge_curve import MergeCurve
from workbench.widgets.parts import Panel, sentence
from workbench.widgets.unit_tables import layered

__all__ = ["LARGEST_K", "NO_CLUSTER", "UnitControls"]

LARGEST_K = 256
NO_CLUSTER = -1


class UnitControls(Panel):
    """Pickers of a module, a form, k, colours and labels, and the two reweightings; the explorer arranges and hears them."""

    stack: Stack
    curve: MergeCurve
    seed: int

    @property
    def module(self) -> str:
        """The picked module."""
        return self._modules[self.layer.value][self.projection.value]

    def _check(self, module: str, canonical: str, k: int) -> None:
        if module not in self.stack.outline:
            raise MergeError(f"no module {module!r} in this stack; it has {', '.join(list(self.stack.outline)[:3])}, …")
        if canonical not in CANONICAL:
            raise MergeError(f"canonical form {canonical!r} is unknown; choose one of {', '.join(CANONICAL)}")
        if not 1 <= k <= LARGEST_K:
            raise MergeError(f"k is {k!r}, expected 1 … {LARGEST_K}, the slider's range")

    def _controls(self, columns: list[str], canonical: str, k: int) -> None:
        self._modules, self._setting = layered(self.stack.outline), False
        style = {"description_width": "8em"}
        wide = {"width": "20em"}

        def menu(options, value, description, tooltip):
            shape = {"style": style, "layout": wide}
            return ipywidgets.Dropdown(options=options, value=value, description=description, tooltip=tooltip, **shape)

        self.layer = menu(list(self._modules), next(iter(self._modules)), "Layer", "The layer whose units are shown")
        self.projection = menu([], None, "Projection", "The projection of that layer")
        self.form = menu(CANONICAL, canonical, "Canonical form", "The form of the units that k-means sees")
        largest = min(LARGEST_K, max(map(len, self.stack.outline.values())))
        self.k = ipywidgets.IntSlider(
            min(k, largest),
            min=1,
            max=largest,
            description="k",
            tooltip="Clusters of the module, and units of the merge in each module; clustered when released",
            continuous_update=False,
            style=style,
            layout={"width": "40em"},
        )
        self.colour = menu(["adapter", "cluster", *columns, "norm"], "cluster", "Colour", "What a point's colour tells")
        self.label = menu(
            [("none", ""), *((name, name) for name in columns)],
            columns[0] if columns else "",
            "Purity by",
            "The label that clusters are compared with",
        )
        self.cluster = menu(
            [("none", NO_CLUSTER)], NO_CLUSTER, "Pick cluster", "Pick the units of a cluster on the map"
        )
        self.parameter = ipywidgets.Checkbox(
            True,
            description="Parameter reweighting",
            tooltip="Rescale each centroid to its cluster's mean norm",
            indent=False,
        )
        self.output = ipywidgets.Checkbox(
            True, description="Output reweighting", tooltip="Multiply the merge by √(r / k)", indent=False
        )

    def _options(self) -> dict:
        """LEGO's options but k, as the controls stand."""
        options = {"canonical": self.form.value, "seed": self.seed}
        if not self.parameter.value:
            options["parameter_reweighting"] = False
        if not self.output.value:
            options["output_reweighting"] = False
        return options

    def _place(self, module: str) -> None:
        """Set the pickers to a module."""
        layer, name = next((la, n) for la, found in self._modules.items() for n, m in found.items() if m == module)
        self._setting = True
        self.layer.value = layer
        self.projection.options = list(self._modules[layer])
        self.projection.value = name
        self._setting = False

    def _kept(self) -> dict[str, ipywidgets.Widget]:
        return {
            "form": self.form,
            "k": self.k,
            "colour": self.colour,
            "label": self.label,
            "parameter": self.parameter,
            "output": self.output,
            "merged": self.curve.chosen,
            "ks": self.curve.ks,
        }

    def _keep(self) -> None:
        """Keep the settings under the key, where there is one."""
        settings = {name: control.value for name, control in self._kept().items()}
        self.remember({"module": self.module} | settings)

    def _remembered(self) -> str:
        """Take up what is kept under the key; a sentence on what of it does not fit any more."""
        kept, lost = self.recall(), []
        if (module := kept.pop("module", None)) is not None:
            if module in self.stack.outline:
                self._place(module)
            else:
                lost.append(f"module {module}")
        if "merged" in kept:
            lost += [f"adapter {name}" for name in kept["merged"] if name not in self.stack.names]
            kept["merged"] = tuple(name for name in kept["merged"] if name in self.stack.names)
        for name, value in kept.items():
            control = self._kept()[name]
            if name == "k" and value > control.max:
                lost.append(f"k = {value}")
                continue
            try:
                control.value = value
            except Exception:  # traitlets says in many ways that a value is not among the options
                lost.append(f"{name} {value}")
        return sentence(f"No longer here, and left out: {', '.join(lost)}.") if lost else ""
