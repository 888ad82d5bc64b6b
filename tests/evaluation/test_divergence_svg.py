"""The picture of the divergence, read back into numbers by its own ticks."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from toss_lightning.evaluation.divergence_svg import draw_divergence

SVG = "{http://www.w3.org/2000/svg}"
PANELS = {
    "harmful replies": {"base": [0.0] * 12, "sft": [2.5 / (at + 1) for at in range(12)], "target": [0.25] * 12},
    "task replies": {"base": [0.0] * 3, "sft": [0.5, 0.75, 0.0], "target": [0.1, 0.0, 0.3]},
}
NAMES = {"sft": "plain <SFT>", "target": "TOSS"}


def texts(svg: str) -> dict[str, list[tuple[float, float]]]:
    """What is written -> where."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in ET.fromstring(svg).iter(f"{SVG}text"):
        found.setdefault("".join(one.itertext()), []).append((float(one.attrib["x"]), float(one.attrib["y"])))
    return found


def curves(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in one.attrib["points"].split())]
        for one in ET.fromstring(svg).iter(f"{SVG}polyline")
    ]


def test_what_is_drawn_are_the_numbers() -> None:
    svg = draw_divergence(PANELS, NAMES)
    said = texts(svg)
    ((_, zero),), ((_, one),) = said["0.0"], said["1.0"]
    # a panel for each kind, in order, with a line for each adapter beside the base
    lines = curves(svg)
    wanted = [PANELS[kind][adapter] for kind in PANELS for adapter in ("sft", "target")]
    assert len(lines) == len(wanted)
    for points, values in zip(lines, wanted, strict=True):
        # texts stand a little below what they name
        read = [(zero - 4.5 - y) / (zero - one) for _, y in points]
        assert read == pytest.approx(values, abs=0.002)
    for number, points in enumerate(lines):
        panel = number // 2
        first, tenth = said["1"][panel][0], said["10"][panel][0]
        assert [x for x, _ in points] == pytest.approx(
            [first + at * (tenth - first) / 9 for at in range(len(points))], abs=0.15
        )


def test_lines_differ_in_colour_and_dashes_and_are_named() -> None:
    svg = draw_divergence(PANELS, NAMES)
    styles = [
        (one.attrib["stroke"], one.attrib.get("stroke-dasharray")) for one in ET.fromstring(svg).iter(f"{SVG}polyline")
    ]
    assert styles[:2] == styles[2:]
    assert len({colour for colour, _ in styles}) == len({dashes for _, dashes in styles}) == 2
    said = texts(svg)
    assert {"plain <SFT>", "TOSS", *PANELS, "mean KL(base || adapter), nats per token"} <= said.keys()
    assert "base" not in said


def test_everything_is_on_the_canvas() -> None:
    for names in (NAMES, {"sft": "a name that is long " * 5, "target": "TOSS"}):
        root = ET.fromstring(draw_divergence(PANELS, names))
        width, height = (float(root.attrib[side]) for side in ("width", "height"))
        for one in root.iter():
            for name, most in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("y1", height),
                ("y2", height),
            ):
                assert 0 <= float(one.attrib.get(name, 0)) <= most
        for points in curves(ET.tostring(root, encoding="unicode")):
            assert all(0 < x < width and 0 < y < height for x, y in points)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [3e-7, 0.0], [40.0]])
def test_one_position_nothing_and_next_to_nothing_can_be_drawn(values: list[float]) -> None:
    svg = draw_divergence({"harmful replies": {"base": [0.0] * len(values), "target": values}}, {})
    (points,) = curves(svg)
    heights = [y for _, y in points]
    for (ours, low), (theirs, high) in pairwise(zip(values, heights, strict=True)):
        assert (ours > theirs) == (low < high)
    assert "target" in texts(svg)


def test_an_adapter_may_be_missing_in_a_panel() -> None:
    svg = draw_divergence({"a": {"target": [1.0]}, "b": {"sft": [1.0], "target": [0.5]}}, NAMES)
    colours = [one.attrib["stroke"] for one in ET.fromstring(svg).iter(f"{SVG}polyline")]
    assert colours[0] == colours[1] != colours[2]


def test_many_lines_are_named_in_rows_and_told_apart() -> None:
    names = [f"a method of some length {at}" for at in range(26)]
    svg = draw_divergence({"safe replies": {name: [0.1 * at] for at, name in enumerate(names, 1)}}, {})
    root = ET.fromstring(svg)
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    said = texts(svg)
    assert width < 600
    for name in names:
        ((x, y),) = said[name]
        assert 0 < x < width
        assert 0 < y < height
    styles = [(one.attrib["stroke"], one.attrib.get("stroke-dasharray")) for one in root.iter(f"{SVG}polyline")]
    assert len({*styles}) == len(names)
    # the panels lie below all of the legend
    (moved,) = [one.attrib["transform"] for one in root.iter(f"{SVG}g") if "transform" in one.attrib]
    assert float(moved.removesuffix(")").split()[1]) + said["safe replies"][0][1] > max(
        said[name][0][1] for name in names
    )
