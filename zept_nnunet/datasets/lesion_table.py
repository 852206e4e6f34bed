"""The ranges of every lesion property as Markdown: seen types, unseen types, synthetic anomalies of training."""

from __future__ import annotations

from collections.abc import Mapping

from zept_nnunet.datasets.lesions import DEVELOPMENT, FINAL, LESION_TYPES, PROPERTIES, SEEN, of_role, property_range
from zept_nnunet.datasets.phantom_parameters import PHASES
from zept_nnunet.datasets.shapes import Range

Bounds = tuple[float, float, str]


def lesion_tables(anomalies: Mapping[str, Bounds]) -> str:
    """Three tables: ranges by kind of lesion, where unseen ones overlap with training, contrast by phase with sources.

    Args:
        anomalies: property → (low, high, unit) of the synthetic anomalies.
    """
    return "\n\n".join([_ranges(anomalies), _overlaps(anomalies), _contrast()])


def relation(inner: Bounds, outer: Bounds) -> str:
    """Where a range lies against another one: "inside", "outside" (no common value) or "overlaps"."""
    if inner[1] < outer[0] or inner[0] > outer[1]:
        return "outside"
    return "inside" if outer[0] <= inner[0] and inner[1] <= outer[1] else "overlaps"


def _ranges(anomalies: Mapping[str, Bounds]) -> str:
    units = {name: property_range(of_role(SEEN), name)[2] for name in PROPERTIES}
    head = [f"{name.rsplit('_', 1)[0]} ({units[name]})" if "_" in name else name for name in PROPERTIES]
    rows = [["role", "class", "kind", *head, "surface", "rim (mm; HU)"]]
    for role in (SEEN, DEVELOPMENT, FINAL):
        for kind in of_role(role):
            for look in kind.appearances:
                rim = (
                    "–" if look.rim_mm is None or look.rim_hu is None else f"{_span(look.rim_mm)}; {_span(look.rim_hu)}"
                )
                cells = [_span_of(look.bounds(name)) for name in PROPERTIES]
                rows.append([role, kind.name, look.kind, *cells, _span(look.irregularity), rim])
    rows.append(["training", "synthetic anomalies", "–", *(_span_of(anomalies[n]) for n in PROPERTIES), "–", "–"])
    return _markdown(rows)


def _overlaps(anomalies: Mapping[str, Bounds]) -> str:
    seen = of_role(SEEN)
    rows = [["unseen type", "property", "its range", "seen types", "", "synthetic anomalies", ""]]
    for kind in (*of_role(DEVELOPMENT), *of_role(FINAL)):
        for name in PROPERTIES:
            own, of_seen = property_range((kind,), name), property_range(seen, name)
            rows.append(
                [
                    kind.name,
                    name,
                    _span_of(own),
                    _span_of(of_seen),
                    _marked(relation(own, of_seen)),
                    _span_of(anomalies[name]),
                    _marked(relation(own, anomalies[name])),
                ]
            )
    return _markdown(rows)


def _contrast() -> str:
    rows = [["class", "kind", *(f"{p} (HU)" for p in PHASES), "source of the contrast", "source of the size"]]
    for kind in LESION_TYPES.values():
        for look in kind.appearances:
            spans = [_span(look.contrast_hu[p]) for p in PHASES]
            rows.append([kind.name, look.kind, *spans, look.contrast_hu["portal"].source, look.radius_mm.source])
    return _markdown(rows)


def _marked(word: str) -> str:
    return f"**{word}**" if word == "outside" else word


def _span(value: Range) -> str:
    return _span_of((value.low, value.high, value.unit))


def _span_of(bounds: Bounds) -> str:
    low, high = (f"{v:g}".replace("-", "−") for v in bounds[:2])
    return f"{low} to {high}"


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
