"""Model cards: every adapter that leaves the workbench says what it was made of."""

from __future__ import annotations

import html
import json

__all__ = ["model_card"]


def model_card(adapter) -> str:
    """A Hub model card (YAML header and text) for an adapter; strangers' names in it are escaped."""
    info = adapter.info
    header = [
        "---",
        f"base_model: {json.dumps(adapter.base)}",
        "library_name: peft",
        "tags:",
        "- lora",
        "- workbench",
        "---",
        "",
    ]
    lines = [f"# {html.escape(adapter.name)}", ""]
    lines += [
        f"A LoRA adapter for `{html.escape(adapter.base) or 'an unnamed base'}`, written by workbench. "
        f"{len(adapter.modules)} modules, rank up to {adapter.rank}, ‖ΔW‖ = {adapter.norm():.4g}.",
        "",
    ]
    if info.get("method"):
        lines += [
            f"Made by `{info['method']}` with {html.escape(json.dumps(info.get('options', {}), default=str))}.",
            "",
        ]
    for key, title in (
        ("task", "Task"),
        ("training", "Training"),
        ("result", "Result"),
        ("error", "Relative error per module (largest)"),
    ):
        if key in info:
            value = info[key]
            if key == "error":
                value = f"{max(value.values(), default=0.0):.3g}"
            elif not isinstance(value, str):
                value = json.dumps(value, default=str)
            lines += [f"**{title}.** {html.escape(value)}", ""]
    if info.get("sources"):
        lines += ["| source | weight |", "|---|---|"]
        lines += [
            f"| {html.escape(str(name)).replace('|', '&#124;')} | {float(weight):.4g} |"
            for name, weight in info["sources"].items()
        ] + [""]
    if info.get("paper"):
        lines += [f"Method: {info['paper']}", ""]
    return "\n".join(header + lines)
